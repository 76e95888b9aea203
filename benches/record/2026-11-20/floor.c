/* The "floor" of fast.txt: the least a relay can do. Pairs each client connection with one to the
 * upstream and copies, level-triggered epoll, no HTTP, no limits, no error handling to speak of.
 *
 *   cc -O2 -o floor floor.c && ./floor LISTEN_PORT UPSTREAM_PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int peer[65536];
static char buffer[262144];

static void watch(int set, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(set, EPOLL_CTL_ADD, fd, &event);
}

static void pair(int set, int client, const struct sockaddr_in *upstream) {
    int one = 1, engine = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(engine, (const void *)upstream, sizeof *upstream)) {
        close(client);
        close(engine);
        return;
    }
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(engine, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    peer[client] = engine;
    peer[engine] = client;
    watch(set, client);
    watch(set, engine);
}

static void relay(int from) {
    ssize_t got = recv(from, buffer, sizeof buffer, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        close(peer[from]);
        close(from);
        return;
    }
    for (ssize_t at = 0; at < got;) {
        ssize_t sent = send(peer[from], buffer + at, got - at, MSG_NOSIGNAL);
        if (sent >= 0) at += sent;
        else if (errno != EAGAIN) return;
    }
}

int main(int count, char **args) {
    if (count != 3) return 2;
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(atoi(args[1])),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in upstream = own;
    upstream.sin_port = htons(atoi(args[2]));
    int one = 1, set = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&own, sizeof own) || listen(listener, 4096)) return 4;
    watch(set, listener);
    for (struct epoll_event events[256];;) {
        int ready = epoll_wait(set, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) relay(fd);
            else if ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) pair(set, fd, &upstream);
        }
    }
}
