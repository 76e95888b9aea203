"""Times in which the whole machine was stopped, seen by a process that only sleeps and reads the clock.

A virtual machine can be paused for seconds. Nothing runs in such a time, and a request that was under way takes
that much longer, with and without a proxy. Only what is longer than these times says something about a proxy.
"""
import subprocess
import sys
import threading
import time

TICK = 0.02  # seconds
STOP = 0.1  # the least lateness, in seconds, that is a stop. A busy machine delays a tick by milliseconds.


class Stops:
    """Watches the clock in a process, which a busy interpreter cannot delay, until the `with` block ends."""

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n", "the process that reads the clock does not start"
        self.found = []  # (start, end) on the monotonic clock, which all processes share
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def read(self):
        for line in self.process.stdout:
            self.found.append(tuple(map(float, line.split())))

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.reader.join()

    def within(self, start, end):
        """Returns for how many seconds between two times the machine was stopped. Call it after the block."""
        return sum(max(0.0, min(end, stop_end) - max(start, stop_start)) for stop_start, stop_end in self.found)


def watch():
    print("ready", flush=True)
    last = time.monotonic()
    while True:
        time.sleep(TICK)
        now = time.monotonic()
        if now - last > TICK + STOP:
            print(last + TICK, now, flush=True)
        last = now


if __name__ == "__main__":
    watch()
