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

_REFUSALS: Final = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.ESPIPE}
)


def answer(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make a system call; return what it does, or minus the errno of its OSError."""
    try:
        return call(*args, **options)
    except OSError as err:
        return -(err.errno or errno.EIO)


def is_refusal(answered: int) -> bool:
    """Say whether the kernel, a filesystem or a sandbox will not move bytes in this way.

    Any other error is the end's own.
    """
    return -answered in _REFUSALS


def error(answered: int) -> OSError:
    """Return the error that an answer below 0 stands for."""
    return OSError(-answered, os.strerror(-answered))
