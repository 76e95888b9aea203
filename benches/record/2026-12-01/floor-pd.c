/* The "floor" of the rows with a prefill leg in bodies.txt: the least that two legs in turn can do.
 * Sends what a client sends to a prefiller while it arrives, keeps it, sends all of it to a decoder
 * once the prefiller responds, and copies the decoder's response. Level-triggered epoll, no HTTP,
 * no limits, no error handling to speak of. A response must arrive in one piece.
 *
 *   cc -O2 -o floor-pd floor-pd.c && ./floor-pd LISTEN_PORT PREFILL_PORT DECODE_PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum role { CLIENT, PREFILL, DECODE };
struct session {
    int fd[3];
    size_t kept;
    char request[2 << 20];
};
static struct session *session[65536];
static enum role role[65536];
static char buffer[262144];

static void send_all(int fd, const char *bytes, size_t len) {
    for (size_t at = 0; at < len;) {
        ssize_t sent = send(fd, bytes + at, len - at, MSG_NOSIGNAL);
        if (sent >= 0) at += sent;
        else if (errno != EAGAIN) return;
    }
}

static void add(int set, struct session *to, enum role as, int fd) {
    int one = 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    to->fd[as] = fd;
    session[fd] = to;
    role[fd] = as;
    epoll_ctl(set, EPOLL_CTL_ADD, fd, &event);
}

static int dial(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&at, sizeof at)) exit(5);
    return fd;
}

static void relay(int fd) {
    struct session *s = session[fd];
    if (!s) return;
    int is_client = role[fd] == CLIENT;
    char *into = is_client ? s->request + s->kept : buffer;
    size_t room = is_client ? sizeof s->request - s->kept : sizeof buffer;
    ssize_t got = recv(fd, into, room, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        for (int i = 0; i < 3; i++) {
            session[s->fd[i]] = 0;
            close(s->fd[i]);
        }
        free(s);
        return;
    }
    switch (role[fd]) {
    case CLIENT:
        s->kept += got;
        send_all(s->fd[PREFILL], into, got);
        break;
    case PREFILL:
        send_all(s->fd[DECODE], s->request, s->kept);
        s->kept = 0;
        break;
    case DECODE:
        send_all(s->fd[CLIENT], buffer, got);
    }
}

int main(int count, char **args) {
    if (count != 4) return 2;
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(atoi(args[1])),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, set = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&own, sizeof own) || listen(listener, 4096)) return 4;
    struct epoll_event accepts = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(set, EPOLL_CTL_ADD, listener, &accepts);
    for (struct epoll_event events[256];;) {
        int ready = epoll_wait(set, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                relay(fd);
            } else if ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
                struct session *s = calloc(1, sizeof *s);
                add(set, s, CLIENT, fd);
                add(set, s, PREFILL, dial(atoi(args[2])));
                add(set, s, DECODE, dial(atoi(args[3])));
            }
        }
    }
}
