"""One direction of a relay: what one stream socket gives goes to another, until it ends.

Small messages are received and sent, a stream is spliced, and a direction changes between the two
as what it carries changes. While it waits for its source
it holds no pipe and no bytes.
"""

from __future__ import annotations

import errno
from socket import SHUT_WR
from typing import Any, Final

from .._counters import counters
from .._ends.socket import Socket
from .._move.account import Account
from .._move.memory import write
from .._move.splice import stream_through_pool
from .._move.transfer import Transfer
from ..config import KiB

#: A relay receives at most so much at once, as programs on gevent do; after a full read it splices,
#: which costs the same at 40 KB and half as much at 400 KB (benchmarks/relay.py).
READ: Final = 64 * KiB

#: A relay through methods counts what it has sent after each so many bytes: the most in a record of
#: TLS (RFC 8446, 5.1), which goes as a whole.
RECORD: Final = 16 * KiB

#: After so many fills in a row of less than READ it receives again. After one, the end of each big
#: message would be taken for the end of the stream.
SHORT_FILLS: Final = 2


class Spliced(Transfer):
    """Bytes from one plain stream socket of this hub to another; ``delivered`` counts them."""

    __slots__ = ("_initial", "_short_fills", "_splices")

    def __init__(self, src: Socket, dst: Socket, initial: bytes) -> None:
        super().__init__(src, dst)
        self._initial = initial
        #: How many fills in a row were small.
        self._short_fills = 0
        #: False: the kernel will not splice between the two.
        self._splices = True

    def run(self) -> None:
        """Forward the initial bytes and all that comes until the source ends.

        On entry no other greenlet reads from the source or writes to the destination. On exit
        everything is delivered. Lets out what recv(2), send(2) and splice(2) say of the two, what
        waiting for them raises, and what is thrown into the greenlet while it waits.
        """
        initial, self._initial = self._initial, b""
        write(self, initial)
        del initial  # a relay may live for long
        while self._copy():
            self._short_fills = 0
            reason = stream_through_pool(self)
            if reason is not None:
                counters.fell_back(reason)
                self._splices = reason == "no_pipe"

    def half_close(self) -> None:
        """Pass the end of the source on. Lets out what shutdown(2) says."""
        _half_close(self.dst.sock)

    def finish(self) -> None:
        """Do nothing: when both directions have ended, both peers know."""

    def _copy(self) -> bool:
        """Receive and send. True: the last read was full, and splice may do; False: *src* ended.

        On exit everything received is delivered. A read that was not full has left nothing for
        another one, so the source is waited for. Lets out what :meth:`run` does.
        """
        receive, send = self.src.sock._sock.recv, self.dst.sock._sock.send
        while True:
            try:
                data = receive(READ)
            except BlockingIOError:
                self.wait(self.src.wait_read)
                continue
            if not data:
                return False
            try:
                sent = send(data)
            except BlockingIOError:
                sent = 0
            else:
                self.count_delivered(sent, "bytes_copied")
            if sent < len(data):
                write(self, data[sent:])
            full = len(data) == READ
            del data  # an idle relay holds no bytes
            if not full:
                self.wait(self.src.wait_read)
            elif self._splices:
                return True
            else:
                self.give_way()

    def keep_splicing(self, filled: int) -> bool:
        """Go on splicing until several fills in a row were no more than a read would have been."""
        self._short_fills = self._short_fills + 1 if filled < READ else 0
        return self._short_fills < SHORT_FILLS


class ThroughMethods(Account):
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
                self.count_elsewhere(len(piece))
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
