/* Preload this into vLLM on a busy machine. vLLM's workers and NIXL's threads busy-wait, and on a busy core a
 * spinning thread that yields must wait for all other threads. This library makes them sleep 0.2 ms instead.
 *
 *   cc -O2 -shared -fPIC -o patient.so patient.c -ldl && LD_PRELOAD=$PWD/patient.so vllm serve ...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/epoll.h>
#include <time.h>

static void nap(void)
{
    struct timespec time = {0, 200000};
    nanosleep(&time, 0);
}

int sched_yield(void)
{
    nap();
    return 0;
}

int epoll_wait(int epoll, struct epoll_event *events, int max, int timeout)
{
    static int (*next)(int, struct epoll_event *, int, int);
    if (!next)
        next = dlsym(RTLD_NEXT, "epoll_wait");
    int found = next(epoll, events, max, timeout);
    if (found == 0 && timeout == 0)
        nap();
    return found;
}
