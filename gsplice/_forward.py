"""One direction of a relay: what one stream socket gives goes to another, until it ends.

Small messages are received and sent, a stream is spliced, and a direction changes between the two
as what it carries changes; the numbers are in :mod:`gsplice.config`. While it waits for its source
it holds no pipe and no bytes.
"""

from __future__ import annotations

import errno
import os
from socket import SHUT_WR
from typing import Any

from . import pipes
from ._stats import counters
from ._streams import Refused, drain, fill
from ._transfer import Transfer, write
from .config import LULL, PIECE, READ, RECORD, SHORT_FILLS
from .endpoints import Socket


class Spliced(Transfer):
    """Bytes from one plain stream socket of this hub to another; ``delivered`` counts them."""

    __slots__ = ("_dst", "_initial", "_splices", "_src")

    def __init__(self, src: Socket, dst: Socket, initial: bytes) -> None:
        super().__init__()
        self._src = src
        self._dst = dst
        self._initial = initial
        #: False: the kernel will not splice between the two.
        self._splices = True

    def run(self) -> None:
        """Forward the initial bytes and all that comes until the source ends.

        On entry no other greenlet reads from the source or writes to the destination. On exit
        everything is delivered. Lets out what recv(2), send(2) and splice(2) say of the two, what
        waiting for them raises, and what is thrown into the greenlet while it waits.
        """
        initial, self._initial = self._initial, b""
        write(self, self._dst, initial)
        del initial  # a relay may live for long
        while self._copy():
            self._stream()

    def half_close(self) -> None:
        """Pass the end of the source on. Lets out what shutdown(2) says."""
        _half_close(self._dst.sock)

    def finish(self) -> None:
        """Do nothing: when both directions have ended, both peers know."""

    def _copy(self) -> bool:
        """Receive and send. True: the last read was full, and splice may do; False: *src* ended.

        On exit everything received is delivered. A read that was not full has left nothing for
        another one, so the source is waited for. Lets out what :meth:`run` does.
        """
        receive, send = self._src.sock._sock.recv, self._dst.sock._sock.send
        while True:
            try:
                data = receive(READ)
            except BlockingIOError:
                self._wait_for_source()
                continue
            if not data:
                return False
            try:
                sent = send(data)
            except BlockingIOError:
                sent = 0
            else:
                self.moved(sent, "bytes_copied")
            if sent < len(data):
                write(self, self._dst, data[sent:])
            full = len(data) == READ
            del data  # an idle relay holds no bytes
            if not full:
                self._wait_for_source()
            elif self._splices:
                return True
            else:
                self.give_way()

    def _stream(self) -> None:
        """Splice until the stream has become small messages, or splice gets no further.

        On exit everything taken is delivered. Whether the source has ended, recv(2) must say: at
        TCP's urgent mark splice(2) answers 0, or EAGAIN, for ever, and recv(2) goes on behind it.
        Lets out what :meth:`run` does.
        """
        short = 0
        waited = False
        while short < SHORT_FILLS:
            pipe = pipes.acquire()
            if pipe is None:
                counters.fell_back("no_pipe")
                return
            try:
                filled = fill(pipe, self._src, PIECE)
                refused = bool(filled) and not drain(self, pipe, self._dst)
            except Refused:
                refused = True
            finally:
                pipes.release(pipe)
            if refused:
                counters.fell_back("refused")
                self._splices = False
                return
            if filled:
                short = short + 1 if filled < READ else 0
            elif filled == 0 or waited:
                return
            waited = not filled or filled < LULL
            if waited:
                self._wait_for_source()
            else:
                self.give_way()

    def _wait_for_source(self) -> None:
        """Wait as recv() would. Raises OSError (EBADF) if the socket has been closed meanwhile."""
        sock = self._src.sock
        event = sock._read_event
        if event is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._since_switch = 0
        sock._wait(event)
        self.check_process()


class ThroughMethods(Transfer):
    """Bytes from one socket to another, of any kind, by their own ``recv`` and ``sendall``."""

    __slots__ = ("_dst", "_initial", "_src")

    def __init__(self, src: Any, dst: Any, initial: bytes) -> None:
        super().__init__()
        self._src = src
        self._dst = dst
        self._initial = initial

    def run(self) -> None:
        """Do what :meth:`Spliced.run` does. Lets out what the methods raise."""
        data, self._initial = self._initial, b""
        while True:
            for begin in range(0, len(data), RECORD):
                piece = data[begin : begin + RECORD]
                self._dst.sendall(piece)
                self.check_process()
                self.passed(len(piece))
                del piece
            del data  # an idle relay holds no bytes
            data = self._src.recv(READ)
            self.check_process()
            if not data:
                break

    def half_close(self) -> None:
        """Pass the end of the source on, but not to a TLS socket. Lets out what shutdown() does."""
        if not _is_tls(self._dst):
            _half_close(self._dst)

    def finish(self) -> None:
        """Tell a TLS peer, which has ended as well, that the stream was whole (close_notify)."""
        if _is_tls(self._dst):
            try:
                self._dst.unwrap()
            except TimeoutError:
                raise
            except (OSError, ValueError):  # it has gone already
                pass


def _is_tls(sock: Any) -> bool:
    """Say whether *sock* speaks TLS; its shutdown() would end decryption as well."""
    return hasattr(sock, "unwrap")


def _half_close(sock: Any) -> None:
    """Tell the peer of *sock* that no more bytes come, unless it has gone already (ENOTCONN)."""
    try:
        sock.shutdown(SHUT_WR)
    except OSError as err:
        if err.errno != errno.ENOTCONN:
            raise
