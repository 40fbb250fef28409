"""The least that sending a hot file costs under gevent: its system calls and its waits, no more."""

from __future__ import annotations

import os
from typing import Any

from _measure import KiB, MiB

#: Most bytes asked for in one call.
PIECE = 2 * MiB
#: The capacity of the pipes.
CAPACITY = 1 * MiB
#: The least that is put into a pipe that is given back.
LEAST_FILL = 64 * KiB

FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

Pair = tuple[int, int]


def by_sendfile(sock: Any, fd: int, size: int) -> None:
    to, offset = sock.fileno(), 0
    while offset < size:
        try:
            offset += os.sendfile(to, fd, offset, min(PIECE, size - offset))
        except BlockingIOError:
            sock._wait(sock._write_event)


def by_held_pipe(sock: Any, fd: int, pipe: Pair, size: int) -> None:
    """Splice through *pipe*, which keeps what the socket does not take."""
    to, offset, (read_fd, write_fd) = sock.fileno(), 0, pipe
    while offset < size:
        held = os.splice(fd, write_fd, min(PIECE, size - offset), offset, flags=FLAGS)
        offset += held
        while held:
            try:
                held -= os.splice(read_fd, to, held, flags=FLAGS)
            except BlockingIOError:
                sock._wait(sock._write_event)


def by_emptied_pipe(sock: Any, fd: int, pipe: Pair, null: int, size: int) -> None:
    """Splice through *pipe*, which is empty in each wait: the rest has gone to *null*, /dev/null.

    So that there is little of it, no more is put in than twice what the socket took last.
    """
    to, offset, most, (read_fd, write_fd) = sock.fileno(), 0, PIECE, pipe
    while offset < size:
        filled = held = os.splice(fd, write_fd, min(most, size - offset), offset, flags=FLAGS)
        full = False
        while held and not full:
            try:
                held -= os.splice(read_fd, to, held, flags=FLAGS)
            except BlockingIOError:
                full = True
        taken = filled - held
        offset += taken
        most = min(PIECE, max(LEAST_FILL, 2 * taken))
        while held:
            held -= os.splice(read_fd, null, held, flags=FLAGS)
        if full:
            sock._wait(sock._write_event)
