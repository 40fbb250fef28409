"""``gsplice.relay``: forwarding both ways between two stream sockets."""

from __future__ import annotations

import _socket
from socket import SOCK_STREAM
from time import monotonic
from typing import Any, Final, NamedTuple

from gevent import get_hub
from greenlet import getcurrent, greenlet

from .._counters import counters
from .._ends.recognise import NotOurs, stream_socket
from .._os.fork import forked_error
from .._os.hub import hub_to_serve
from .._os.results import has_gone
from .direction import Spliced, ThroughMethods

#: How often in an idle timeout the timer checks the counts: it may end late by one such period.
_LOOKS_PER_TIMEOUT: Final = 8

#: Most seconds between two checks: libuv has no infinite timer.
_LONGEST_PERIOD: Final = 3600.0


class RelayResult(NamedTuple):
    """How many bytes :func:`relay` has delivered each way."""

    a_to_b: int
    b_to_a: int


def relay(
    a: Any,
    b: Any,
    *,
    idle_timeout: float | None = None,
    initial: tuple[bytes, bytes] = (b"", b""),
) -> RelayResult:
    """Forward what *a* gives to *b*, and what *b* gives to *a*, until both have ended.

    When one of them ends, and its last byte is delivered, the other is told (half-close), and may
    go on sending. Both are left open for the caller to close, and neither may be used by anybody
    else meanwhile. *initial* are bytes that the caller has received already, those of *a* and those
    of *b*, as after reading the header of a CONNECT request: they go first, and count.

    Plain gevent stream sockets of this hub (TCP, Unix) are spliced. Others go through their own
    ``recv``, ``sendall`` and ``shutdown``; a TLS socket is told of the end, by ``unwrap``, when
    both have ended, since it can't be half-closed.

    If one of them takes no more (it has closed or reset its connection, as a server does that
    refuses an upload before it has read all of it), only the direction to it ends. The other one
    goes on until it ends or fails, so that what had come already is delivered; then the error of
    the first is raised. Nobody is told of an end then.

    Whatever else is raised under way ends both directions at once. In either case nobody is left at
    work on the sockets, and the exception has an attribute ``relayed``: the :class:`RelayResult` so
    far. It is OSError
    (ConnectionResetError, BrokenPipeError, ...) as the sockets give it, or EBADF if one is closed
    meanwhile; TimeoutError if a wait takes longer than the timeout of the socket that is waited
    for, as in ``recv`` and ``send``, or if neither direction delivers a byte for *idle_timeout*
    seconds (up to an eighth more), so that the caller can tell such an end from a whole one; and
    what is thrown into the calling greenlet. A relay that is under way when the process forks ends
    in the child with OSError (ECANCELED).

    Raises TypeError for what is no stream socket that waits on the hub, and ValueError for a socket
    that is non-blocking or another hub's, for one socket at both ends, and for an *idle_timeout*
    that is not above 0.
    """
    if a is b:
        raise ValueError("a and b are the same socket; each direction needs a reader of its own")
    if idle_timeout is not None and not idle_timeout > 0:
        raise ValueError(f"idle_timeout must be above 0 seconds, or None, not {idle_timeout!r}")
    both = _Both(*_directions(a, b, *(bytes(memoryview(each)) for each in initial)))
    del initial  # a relay may live for long
    try:
        both.run(idle_timeout)
    except BaseException as err:
        err.relayed = both.result()  # type: ignore[attr-defined]
        raise
    return both.result()


def _directions(
    a: Any, b: Any, from_a: bytes, from_b: bytes
) -> tuple[Spliced, Spliced] | tuple[ThroughMethods, ThroughMethods]:
    ends = []
    for name, sock in (("a", a), ("b", b)):
        try:
            ends.append(stream_socket(sock))
        except NotOurs as reason:
            _check(name, sock)
            counters.fell_back(reason.args[0])
    if len(ends) < 2:
        return ThroughMethods(a, b, from_a), ThroughMethods(b, a, from_b)
    one, other = ends
    return Spliced(one, other, from_a), Spliced(other, one, from_b)


def _check(name: str, sock: Any) -> None:
    """Raise TypeError or ValueError if relay() can't use the methods of *sock* either."""
    if hub_to_serve() is None:
        raise ValueError(
            "relay() waits, which can be done in a greenlet, but not in the hub itself"
        )
    if isinstance(sock, _socket.socket):
        raise TypeError(
            f"{name} is a native socket, which would block the hub: {sock!r}; use"
            " gevent.socket.socket, or patch the socket module before the socket is made"
        )
    methods = ("recv", "sendall", "shutdown")
    if not all(hasattr(sock, method) for method in methods):
        raise TypeError(f"{name} must be a socket with {', '.join(methods)}, not {sock!r}")
    if getattr(sock, "type", SOCK_STREAM) != SOCK_STREAM:
        raise TypeError(f"{name} must be a stream socket, not {sock!r}")
    if getattr(sock, "timeout", None) == 0.0:
        raise ValueError(f"{name} has timeout 0, so it can't be waited for: {sock!r}")
    if getattr(sock, "hub", get_hub()) is not get_hub():
        raise ValueError(f"{name} belongs to the hub of another thread: {sock!r}")


class _Both:
    """Both directions of a relay: *there* in the calling greenlet, *back* in one of its own.

    The two wake and end each other only by callbacks of the loop, as gevent's greenlets do. libuv
    keeps its list of due timers on the hub's C stack. Unwinding a greenlet inside a loop callback
    could close a timer on that list while the hub's stack is switched out.
    """

    __slots__ = (
        "_back",
        "_back_ended",
        "_caller",
        "_error",
        "_hub",
        "_send_error",
        "_start",
        "_there",
        "_waiting",
    )

    def __init__(self, there: Spliced | ThroughMethods, back: Spliced | ThroughMethods) -> None:
        self._there = there
        self._back = back
        self._back_ended = False
        self._hub = get_hub()
        #: The calling greenlet, until one direction has failed.
        self._caller: Any = getcurrent()
        #: The calling greenlet, while it does nothing but wait for *back* to end.
        self._waiting: Any = None
        #: The callback that starts *back*, until it has run.
        self._start: Any = None
        #: The exception that the calling greenlet has to raise.
        self._error: BaseException | None = None
        #: The error of the direction whose destination takes no more.
        self._send_error: OSError | None = None

    def result(self) -> RelayResult:
        """Return what has been delivered so far."""
        return RelayResult(self._there.delivered, self._back.delivered)

    def run(self, idle_timeout: float | None) -> None:
        """Run both directions until both have ended, or one has failed. On exit neither runs.

        But if something is thrown into the calling greenlet while it ends the other direction, that
        one ends in the loop's next turn. Lets out the directions' errors, and what is thrown in.
        """
        loop = self._hub.loop
        timer = None if idle_timeout is None else self._end_when_idle(idle_timeout)
        other = greenlet(self._run_back, self._hub)
        try:
            self._start = loop.run_callback(other.switch)
            self._forward(self._there)
            self._wait_for_back()
            if self._error is not None:
                raise self._error
            if self._send_error is not None:
                raise self._send_error
            self._there.finish()
            self._back.finish()
        except OSError as err:
            if self._send_error not in (None, err) and self._there.began_here():
                raise self._send_error from err
            raise
        finally:
            self._caller = self._error = self._send_error = None
            if self._start is not None:
                self._start.stop()
            if timer is not None:
                timer.close()
            if other:  # it has begun and not ended
                loop.run_callback(other.throw)  # GreenletExit
                self._wait_for_back()

    def _forward(self, direction: Spliced | ThroughMethods) -> None:
        try:
            direction.run()
        except OSError as err:
            if not (direction.write_failed and has_gone(err)):
                raise
            if self._send_error is None:
                self._send_error = err
            return
        # After a reset one direction gets the error, and the other then reads an end of file.
        if self._error is None and self._send_error is None and self._caller is not None:
            direction.half_close()

    def _run_back(self) -> None:
        self._start = None
        try:
            self._forward(self._back)
        except BaseException as err:  # noqa: BLE001  (the calling greenlet raises it)
            self._error = err
        self._back_ended = True
        self._hub.loop.run_callback(self._report)

    def _wait_for_back(self) -> None:
        try:
            while not self._back_ended:
                self._waiting = getcurrent()
                self._hub.switch()
        finally:
            self._waiting = None

    def _report(self) -> None:
        """Raise the error in the calling greenlet, or wake it as *back* ended. A loop callback."""
        error, self._error = self._error, None
        if error is not None and self._caller is not None:
            self._caller.throw(error)
        elif self._waiting is not None:
            self._waiting.switch()

    def _end_when_idle(self, timeout: float) -> Any:
        """Start a timer that raises TimeoutError in the calling greenlet; return it."""
        seen = self.result()
        since = monotonic()

        def check() -> None:
            nonlocal seen, since
            if not self._there.began_here():
                self._error = forked_error()
                self._hub.loop.run_callback(self._report)
            elif self.result() != seen:
                seen, since = self.result(), monotonic()
            elif monotonic() - since >= timeout:
                text = f"neither direction has delivered a byte for {timeout:g} seconds"
                self._error = TimeoutError(text)
                self._hub.loop.run_callback(self._report)

        every = max(min(timeout, _LONGEST_PERIOD * _LOOKS_PER_TIMEOUT) / _LOOKS_PER_TIMEOUT, 0.001)
        timer = self._hub.loop.timer(every, every)
        timer.start(check)
        return timer
