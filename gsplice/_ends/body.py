"""The body of an HTTP message as an end: a known number of bytes on a socket.

The object that gives the body (a client's response, a server's ``wsgi.input``) counts how many
bytes remain. No more are taken, and its count is corrected with each piece. What else an object
does at the end of its body differs, so after the transfer the caller calls the object's own
``read()``, which finds nothing more, or raises its error for a body cut short.
"""

from __future__ import annotations

from .socket import Socket


class Body(Socket):
    """What remains of a body. Subclasses say how much that is, and count what is taken."""

    __slots__ = ()

    needs_final_read = True

    def take_buffered(self, most: int | None) -> bytes:
        """Take at most *most* buffered bytes of the body. Neither reads the socket nor waits."""
        remaining = self.remaining()
        data = super().take_buffered(remaining if most is None else min(remaining, most))
        self.note_taken(len(data))
        return data

    def receive(self, most: int) -> bytes | int:
        """Receive without waiting, and count the bytes as taken; or return minus the errno."""
        data = super().receive(most)
        if isinstance(data, bytes):
            self.note_taken(len(data))
        return data
