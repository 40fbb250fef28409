/* Makes one command of fcntl(2) fail: strace can only make all of them fail.
 *
 * Preloaded; fault_arm() says which command, with which errno, at which call and, after that, at
 * every so many calls (0: never again). It returns how many have been made to fail so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>

static volatile int fault_cmd = -1, fault_errno, fault_first, fault_step, seen, injected;

int fault_arm(int cmd, int error, int first, int step)
{
    fault_cmd = cmd;
    fault_errno = error;
    fault_first = first;
    fault_step = step;
    seen = 0;
    return injected;
}

static int fails(int cmd)
{
    if (cmd != fault_cmd)
        return 0;
    seen++;
    if (seen != fault_first
        && !(fault_step && seen > fault_first && (seen - fault_first) % fault_step == 0))
        return 0;
    injected++;
    errno = fault_errno;
    return 1;
}

#define SHIM(name)                                                    \
    int name(int fd, int cmd, ...)                                    \
    {                                                                 \
        static int (*real)(int, int, ...);                            \
        va_list args;                                                 \
        void *arg;                                                    \
        va_start(args, cmd);                                          \
        arg = va_arg(args, void *);                                   \
        va_end(args);                                                 \
        if (fails(cmd))                                               \
            return -1;                                                \
        if (!real)                                                    \
            real = (int (*)(int, int, ...))dlsym(RTLD_NEXT, #name);   \
        return real(fd, cmd, arg);                                    \
    }

SHIM(fcntl)
SHIM(fcntl64)
