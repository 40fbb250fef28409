/* A relay in C: epoll, and splice(2) through a pipe in each direction. "relay_splice PORT" prints
 * the port on which it listens, and forwards every connection to PORT of this machine. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CAPACITY (1 << 20)

struct flow {
    int from, to, pipe[2];
    size_t held; /* bytes in the pipe */
    bool ended;
};

/* A connection and the one to the backend. Never freed but used again: an event may come late. */
struct pair {
    struct flow flows[2];
    bool open;
    struct pair *next;
};

static struct pair *unused;

/* Move bytes until a call would wait: an edge tells when to go on. False if the peer is gone. */
static bool run(struct flow *flow)
{
    const unsigned flags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK;
    while (!flow->ended) {
        if (!flow->held) {
            ssize_t got = splice(flow->from, NULL, flow->pipe[1], NULL, CAPACITY, flags);
            if (got < 0)
                return errno == EAGAIN;
            flow->held = got;
            flow->ended = !got;
        }
        while (flow->held) {
            ssize_t sent = splice(flow->pipe[0], NULL, flow->to, NULL, flow->held, flags);
            if (sent <= 0)
                return sent < 0 && errno == EAGAIN;
            flow->held -= sent;
        }
        if (flow->ended)
            shutdown(flow->to, SHUT_WR);
    }
    return true;
}

static void close_pair(struct pair *pair)
{
    for (struct flow *flow = pair->flows; flow < pair->flows + 2; flow++) {
        close(flow->from);
        close(flow->pipe[0]);
        close(flow->pipe[1]);
    }
    pair->open = false;
    pair->next = unused;
    unused = pair;
}

static void watch(int epoll, int fd, struct pair *pair)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = pair};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        err(1, "epoll_ctl");
}

static void add_pair(int epoll, int a, const struct sockaddr_in *backend)
{
    struct pair *pair = unused ? unused : malloc(sizeof *pair);
    int b = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!pair || b < 0 || connect(b, (const void *)backend, sizeof *backend))
        err(1, "backend");
    if (pair == unused)
        unused = pair->next;
    *pair = (struct pair){.flows = {{.from = a, .to = b}, {.from = b, .to = a}}, .open = true};
    for (struct flow *flow = pair->flows; flow < pair->flows + 2; flow++) {
        if (pipe2(flow->pipe, O_CLOEXEC | O_NONBLOCK))
            err(1, "pipe2");
        fcntl(flow->pipe[1], F_SETPIPE_SZ, CAPACITY); /* or as large as it is */
    }
    watch(epoll, a, pair);
    watch(epoll, b, pair);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        errx(2, "usage: relay_splice PORT");
    signal(SIGPIPE, SIG_IGN);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in backend = here;
    backend.sin_port = htons(atoi(argv[1]));
    socklen_t size = sizeof here;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(listener, (void *)&here, size) || listen(listener, 1024) ||
        getsockname(listener, (void *)&here, &size))
        err(1, "listen");
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[64], accepting = {.events = EPOLLIN};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &accepting))
        err(1, "epoll");
    for (;;) {
        int number = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < number; i++) {
            struct pair *pair = events[i].data.ptr;
            if (!pair) {
                int a = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                if (a >= 0)
                    add_pair(epoll, a, &backend);
            } else if (pair->open) {
                bool both = run(&pair->flows[0]) && run(&pair->flows[1]);
                if (!both || (pair->flows[0].ended && pair->flows[1].ended))
                    close_pair(pair);
            }
        }
    }
}
