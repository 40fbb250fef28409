"""One direction of a relay: from one stream socket to another, until the first one ends.

Small messages are received and sent, long streams are spliced; a direction switches between the two
by how many bytes come at once. While it waits for its source it holds no pipe and no bytes.
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

#: Most bytes received at once, as programs on gevent do. After a full read the direction splices:
#: that costs the same at 40 KB and half as much at 400 KB (benchmarks/relay.py).
READ: Final = 64 * KiB

#: A relay through methods sends, and counts, so many bytes at once: the most in a record of TLS,
#: which can't be sent in part (RFC 8446, 5.1).
RECORD: Final = 16 * KiB

#: After so many fills of less than READ in a row, the direction receives again. Not after one,
#: which may be just the end of a big message.
SHORT_FILLS: Final = 2


class Spliced(Transfer):
    """Bytes from one plain stream socket of this hub to another; ``delivered`` counts them."""

    __slots__ = ("_initial", "_short_fills", "_splices")

    def __init__(self, src: Socket, dst: Socket, initial: bytes) -> None:
        super().__init__(src, dst)
        self._initial = initial
        #: How many fills in a row were less than READ.
        self._short_fills = 0
        #: Whether the kernel splices between the two.
        self._splices = True

    def run(self) -> None:
        """Forward the initial bytes, and then all that the source gives, until it ends.

        On entry no other greenlet reads from the source or writes to the destination. On exit
        everything is delivered. Lets out the errors of recv(2), send(2) and splice(2), of waiting
        for the sockets, and what is thrown into the greenlet while it waits.
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
        """Tell the destination's peer that the source has ended. Lets out errors of shutdown(2)."""
        _half_close(self.dst.sock)

    def finish(self) -> None:
        """Do nothing: when both directions have ended, both peers know."""

    def _copy(self) -> bool:
        """Receive and send until a read is full and may be followed by splicing (True), or the end.

        On exit everything received is delivered. Lets out what :meth:`run` does.
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
            except OSError:
                self.write_failed = True
                raise
            else:
                self.count_delivered(sent, "bytes_copied")
            if sent < len(data):
                write(self, data[sent:])
            full = len(data) == READ
            del data  # an idle relay holds no bytes
            if not full:  # the socket is empty now
                self.wait(self.src.wait_read)
            elif self._splices:
                return True
            else:
                self.give_way()

    def keep_splicing(self, filled: int) -> bool:
        """Return False after SHORT_FILLS fills in a row of less than READ bytes."""
        self._short_fills = self._short_fills + 1 if filled < READ else 0
        return self._short_fills < SHORT_FILLS


class ThroughMethods(Account):
    """From one socket of any kind to another, by their own ``recv`` and ``sendall``."""

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
                try:
                    self._dst.sendall(piece)
                except OSError:
                    self.write_failed = True
                    raise
                self.check_process()
                self.count_elsewhere(len(piece))
                del piece
            del data  # an idle relay holds no bytes
            data = self._src.recv(READ)
            self.check_process()
            if not data:
                break

    def half_close(self) -> None:
        """Do what :meth:`Spliced.half_close` does, but not to a TLS socket."""
        if not _is_tls(self._dst):
            _half_close(self._dst)

    def finish(self) -> None:
        """Send a TLS peer close_notify, when it has ended as well: the stream was complete.

        Lets out TimeoutError.
        """
        if _is_tls(self._dst):
            try:
                self._dst.unwrap()
            except TimeoutError:
                raise
            except (OSError, ValueError):  # the peer has gone already
                pass


def _is_tls(sock: Any) -> bool:
    """Return whether *sock* is a TLS socket, whose shutdown() would end decryption as well."""
    return hasattr(sock, "unwrap")


def _half_close(sock: Any) -> None:
    """Shut *sock* down for writing. Lets out the error, unless the peer has gone (ENOTCONN)."""
    try:
        sock.shutdown(SHUT_WR)
    except OSError as err:
        if err.errno != errno.ENOTCONN:
            raise
