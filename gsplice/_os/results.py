"""How a step of a transfer answers: the number of bytes it moved, or below 0, minus the errno.

That is the kernel's own language. An answer can pass from a thread to a greenlet, and be looked at,
without an exception, whose traceback would hold on to everything that its frames refer to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

#: The source has nothing now, or the destination takes nothing.
NOT_NOW: Final = -errno.EAGAIN

#: splice(2) took nothing of what there was, and gave no reason.
TOOK_NOTHING: Final = -errno.EINVAL

#: What the kernel or a sandbox answers when it will not move bytes from a socket in this way.
_REFUSALS: Final = frozenset(
    {
        errno.EINVAL,
        errno.ENOMEM,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.ESPIPE,
        errno.EXDEV,
    }
)

#: What the kernel says of a connection, or of a pipe that nobody reads, when bytes are to go there.
_NO_WAY_THERE: Final = frozenset(
    {
        errno.EBADF,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.EPROTO,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
    }
)


def answer(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make a system call; return what it does, or minus the errno of its OSError."""
    try:
        return call(*args, **options)
    except OSError as err:
        return -(err.errno or errno.EIO)


def can_recv_after(minus_errno: int) -> bool:
    """Say whether recv(2) may be tried after that error of a socket that is read.

    Any other is told only once, and recv(2) would find an end of file then.
    """
    return -minus_errno in _REFUSALS


def can_send_after(minus_errno: int) -> bool:
    """Say whether send(2) or write(2) may be tried after that error of a connection or pipe.

    If anything else is wrong it says so, and says what.
    """
    return -minus_errno not in _NO_WAY_THERE


def error(minus_errno: int) -> OSError:
    """Return the error that an answer below 0 stands for."""
    return OSError(-minus_errno, os.strerror(-minus_errno))
