"""What a step of a transfer returns: how many bytes it moved, or minus the errno.

A number can pass from a thread to a greenlet where an exception would bring its traceback along,
and with that everything that the frames refer to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

from .linux import SPLICE_FLAGS

#: The source has nothing now, or the destination takes nothing.
NOT_NOW: Final = -errno.EAGAIN

#: splice(2) returned 0 although there were bytes to move.
TOOK_NOTHING: Final = -errno.EINVAL

#: The errors of a kernel, or a sandbox, that does not splice from a socket.
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

#: The errors of a connection, or of a pipe that nobody reads, when bytes are to go there.
_DESTINATION_GONE: Final = frozenset(
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
    """Make one system call; return what it returns, or minus the errno of its OSError.

    Lets out what a signal handler raises that runs here, OSError too (a TimeoutError of an alarm):
    the call may have succeeded before, so that cannot be its answer.
    """
    try:
        return call(*args, **options)
    except OSError as err:
        return _minus_errno(err, call)


def splice(source: int, destination: int, most: int, offset: int | None = None) -> int:
    """Splice *most* bytes at most, waiting for no pipe or socket; return how many, or minus errno.

    *offset*: where to read if *source* is a file, whose own position is then left alone. Lets out
    what :func:`answer` does.
    """
    try:
        return os.splice(source, destination, most, offset, None, SPLICE_FLAGS)
    except OSError as err:
        return _minus_errno(err, os.splice)


def _minus_errno(err: OSError, call: Callable[..., Any]) -> int:
    """Return minus the errno of *err* if *call* raised it; else raise it again."""
    inner = err.__traceback__ and err.__traceback__.tb_next  # None: raised by a built-in
    if inner and inner.tb_frame.f_code is not getattr(call, "__code__", None):
        raise err
    return -(err.errno or errno.EIO)


def answer_of_job(job: Callable[..., Any], *args: Any) -> Any:
    """Run *job*, which may make several calls; return its result, or minus errno of an OSError.

    After an error it is not known how far the job has got.
    """
    try:
        return job(*args)
    except OSError as err:
        return -(err.errno or errno.EIO)


def can_recv_after(minus_errno: int) -> bool:
    """Return whether recv(2) may be tried after that error of splice(2) from a socket.

    Not after an error of the connection: the kernel reports it once, and recv(2) would then find
    the end of the stream.
    """
    return -minus_errno in _REFUSALS


def can_send_after(minus_errno: int) -> bool:
    """Return whether send(2) or write(2) may be tried after that error of splice(2).

    After any error but those of the connection: the call reports it again, in its own words.
    """
    return -minus_errno not in _DESTINATION_GONE


def has_gone(err: OSError) -> bool:
    """Return whether *err*, of a connection, means that its peer takes no more."""
    return err.errno in _DESTINATION_GONE and err.errno != errno.EBADF  # our own close


def error(minus_errno: int) -> OSError:
    """Return the OSError of that number."""
    return OSError(-minus_errno, os.strerror(-minus_errno))
