"""The pool of pipes, for programs that splice on their own.

Borrow a pipe, fill it, drain it, and give it back::

    pipe = gsplice.pipes.acquire()
    if pipe is not None:
        try:
            pipe.pending = gsplice.pipes.UNKNOWN
            pipe.pending = os.splice(source_fd, pipe.write_fd, 65536)
            while pipe.pending:
                pipe.pending -= os.splice(pipe.read_fd, destination_fd, pipe.pending)
        finally:
            gsplice.pipes.release(pipe)
"""

from __future__ import annotations

from ._pool.idle import reclaim
from ._pool.lending import acquire, release
from ._pool.pipe import IDLE, UNKNOWN, Pipe

__all__ = ["IDLE", "UNKNOWN", "Pipe", "acquire", "reclaim", "release"]
