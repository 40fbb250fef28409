"""The body of an HTTP message as an end: bytes on a socket, of which so many belong to it.

What gives the body (a client's response, a server's ``wsgi.input``) knows how many bytes are left.
Only as many are taken, and its count is kept true with each piece. What else happens at the end of
a body differs from one to the other, so whoever has moved the bytes goes on with the object's own
``read()``, which has nothing left to give, or tells what is wrong.
"""

from __future__ import annotations

from .socket import Socket


class Body(Socket):
    """What is left of a body. Subclasses say how much that is, and count what is taken."""

    __slots__ = ()

    needs_final_read = True

    def take_buffered(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it. Neither reads nor waits."""
        left = self.remaining()
        data = super().take_buffered(left if most is None else min(left, most))
        self.note_taken(len(data))
        return data

    def receive(self, most: int) -> bytes | int:
        """Receive what is there, without waiting, and count it as taken; or return minus errno."""
        data = super().receive(most)
        if isinstance(data, bytes):
            self.note_taken(len(data))
        return data
