/* Ways to move a file to a socket in C: the limit. "ways FD FILE" reads lines "WAY SIZE TIMES" and
 * answers each, after sending the first SIZE bytes of FILE to the blocking stream socket FD so many
 * times, with the seconds that took: by the clock, and of this process's CPU time. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)

static int sock, file, pipe_fds[2];
static char *buffer;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static size_t done(ssize_t result, const char *call)
{
    if (result <= 0)
        err(1, "%s", call);
    return result;
}

static void send_all(const char *data, size_t size, int flags)
{
    while (size) {
        size_t sent = done(send(sock, data, size, flags), "send");
        data += sent;
        size -= sent;
    }
}

static void read_and_send(size_t size, size_t piece)
{
    for (size_t offset = 0, got; offset < size; offset += got) {
        got = done(pread(file, buffer, min(piece, size - offset), offset), "pread");
        send_all(buffer, got, 0);
    }
}

static void mmap_and_send(size_t size)
{
    char *data = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED)
        err(1, "mmap");
    send_all(data, size, 0);
    munmap(data, size);
}

static void send_file(size_t size)
{
    for (off_t offset = 0; (size_t)offset < size;)
        done(sendfile(sock, file, &offset, size - offset), "sendfile");
}

static void splice_file(size_t size)
{
    size_t capacity = fcntl(pipe_fds[1], F_GETPIPE_SZ);
    for (off_t offset = 0; (size_t)offset < size;) {
        size_t asked = min(capacity, size - offset);
        size_t held = done(splice(file, &offset, pipe_fds[1], NULL, asked, SPLICE_F_MOVE), "splice");
        while (held) {
            unsigned flags = SPLICE_F_MOVE | ((size_t)offset < size ? SPLICE_F_MORE : 0);
            held -= done(splice(pipe_fds[0], NULL, sock, NULL, held, flags), "splice");
        }
    }
}

/* Take the notes that bytes are no longer needed: one for each range of calls. */
static unsigned take_notes(void)
{
    unsigned taken = 0;
    char control[256];
    for (;;) {
        struct msghdr message = {.msg_control = control, .msg_controllen = sizeof control};
        if (recvmsg(sock, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
            return taken;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        struct sock_extended_err *note = (void *)CMSG_DATA(header);
        taken += note->ee_data - note->ee_info + 1;
    }
}

static void zero_copy(size_t size)
{
    int on = 1;
    if (setsockopt(sock, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof on))
        err(1, "SO_ZEROCOPY");
    char *data = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED)
        err(1, "mmap");
    unsigned calls = 0, notes = 0;
    for (size_t offset = 0; offset < size;) {
        ssize_t sent = send(sock, data + offset, min(MIB, size - offset), MSG_ZEROCOPY);
        if (sent < 0 && errno != ENOBUFS)
            err(1, "send");
        if (sent > 0) {
            offset += sent;
            calls++;
        }
        notes += take_notes();
    }
    while (notes < calls) { /* until then the memory is the kernel's */
        struct pollfd ready = {.fd = sock};
        poll(&ready, 1, 100);
        notes += take_notes();
    }
    munmap(data, size);
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    char way[32];
    size_t size, times;
    if (argc != 3)
        errx(2, "usage: ways FD FILE");
    sock = atoi(argv[1]);
    file = open(argv[2], O_RDONLY | O_CLOEXEC);
    buffer = malloc(64 << 10);
    if (file < 0 || !buffer)
        err(1, "%s", argv[2]);
    while (scanf("%31s %zu %zu", way, &size, &times) == 3) {
        size_t number = strcspn(way, "0123456789"), piece = strtoul(way + number, NULL, 10) << 10;
        way[number] = 0;
        if (!strcmp(way, "splice")) {
            if (pipe2(pipe_fds, O_CLOEXEC))
                err(1, "pipe2");
            if (fcntl(pipe_fds[1], F_SETPIPE_SZ, piece) < 0)
                err(1, "F_SETPIPE_SZ");
        }
        double clock = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        for (; times; times--) {
            if (!strcmp(way, "read"))
                read_and_send(size, piece);
            else if (!strcmp(way, "mmap"))
                mmap_and_send(size);
            else if (!strcmp(way, "sendfile"))
                send_file(size);
            else if (!strcmp(way, "splice"))
                splice_file(size);
            else if (!strcmp(way, "zerocopy"))
                zero_copy(size);
            else
                errx(2, "no such way: %s", way);
        }
        cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        printf("%.9f %.9f\n", seconds(CLOCK_MONOTONIC) - clock, cpu);
        fflush(stdout);
        if (!strcmp(way, "splice")) {
            close(pipe_fds[0]);
            close(pipe_fds[1]);
        }
    }
    return 0;
}
