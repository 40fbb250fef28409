"""A call run through the patched name and the unpatched one: all that can be seen afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest
from bench import FITS, Bench, PlainSubclass, as_class
from conftest import counting, receive_all, some_bytes
from gevent.monkey import get_original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import FILE, OLD, PIPE, SOCKET, Sink, Source

from gsplice._ends.small import SMALL_FILE as SMALL


def unpatched_sendfile(*args: Any) -> int:
    return get_original("gevent._socket3.socket", "sendfile")(*args)


def unpatched_copyfileobj(*args: Any) -> None:
    get_original("shutil", "copyfileobj")(*args)


KiB, MiB = 1 << 10, 1 << 20

#: Sizes around each boundary, and some pipes full.
SIZES = st.builds(
    lambda base, more: max(0, base + more),
    st.sampled_from([0, 10, 4 * KiB, 8 * KiB, SMALL, SMALL + 10, 1 * MiB, 2 * MiB, 5 * MiB]),
    st.integers(-1, 1),
)

CONTENT = some_bytes(5 * MiB + 1)

PENDING = b"written before"
AFTER = b"written after"

#: Each test runs on so many examples; on more in the thorough run, on many more in the long one.
many_examples = pytest.mark.parametrize(
    "examples",
    [
        100,
        pytest.param(300, marks=pytest.mark.thorough),
        pytest.param(6000, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
    ids=["short", "thorough", "long"],
)


def run_on(examples: int, check: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
    settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(**strategies)(check))()


@pytest.fixture
def open_bench(tmp_path: Path) -> Callable[[], contextlib.AbstractContextManager[Bench]]:
    """Open a fresh bench, for as many examples as there are."""

    @contextlib.contextmanager
    def opened() -> Iterator[Bench]:
        with gevent.Timeout(60), Bench(tmp_path) as fresh:
            yield fresh

    return opened


@dataclasses.dataclass
class Outcome:
    """What can be seen after a call; compared as a whole."""

    result: Any = None
    error: tuple[type[BaseException], int | None] | None = None
    arrived: bytes | None = dataclasses.field(default=None, repr=False)
    #: Where the objects stand, and what the source gives when it is read on.
    source_at: int | None = None
    sink_at: int | None = None
    next_bytes: bytes | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self.result = function(*args)
        except Exception as err:  # noqa: BLE001 - whatever it is, the other must raise it too
            self.error = type(err), getattr(err, "errno", None)


def position(obj: Any) -> int | None:
    """Return where *obj* stands, if it stands anywhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return obj.tell()
    return None


def read_on(obj: Any) -> Any:
    """Return the next bytes of *obj*, if it is a file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return obj.read(7) if obj.seekable() else None
    return None


def read_before(obj: Any, size: int) -> None:
    """Read *size* bytes of *obj*, so that it stands there and has read ahead, if it can."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        while size > 0 and (data := obj.read(size)):
            size -= len(data)  # a raw one may give less


def moved(grown: SimpleNamespace) -> int:
    return (
        grown.bytes_spliced
        + grown.bytes_sendfile
        + grown.bytes_copy_file_range
        + grown.bytes_copied
    )


# --- sendfile ---


@dataclasses.dataclass(frozen=True)
class Send:
    """A call of sendfile."""

    kind: Source
    size: int
    ahead: int = 0
    offset: Any = 0
    count: Any = None
    timeout: Any = None
    tcp: bool = False
    subclass: bool = False

    def run(self, bench: Bench, function: Callable[..., Any]) -> Outcome:
        data = CONTENT[: self.size]
        source = bench.keep(self.kind.make(bench, data))
        sender, peer = bench.pair(self.tcp)
        if self.subclass:
            sender = as_class(bench, PlainSubclass, sender)
        received = bench.spawn(receive_all, peer)
        read_before(source, self.ahead)
        sender.settimeout(self.timeout)
        outcome = Outcome()
        outcome.call(function, sender, source, self.offset, self.count)
        outcome.source_at = position(source)
        outcome.next_bytes = read_on(source)
        sender.close()
        outcome.arrived = received.get()
        return outcome

    @property
    def reason(self) -> str | None:
        """Say why the call goes to the original; None: it does not."""
        if self.kind.role != FILE:
            return "source_type" if self.kind.role in (PIPE, SOCKET) else self.kind.role
        if self.timeout == 0:
            return "nonblocking"
        return None if type(self.offset) is int else "arguments"

    def check(self, open_bench: Callable[[], contextlib.AbstractContextManager[Bench]]) -> None:
        with open_bench() as bench:
            wanted = self.run(bench, unpatched_sendfile)
        with open_bench() as bench, counting() as grown:
            got = self.run(bench, gevent.socket.socket.sendfile)
        start = self.offset or min(self.ahead, self.size)
        if self.reason is None and got.result and not self.offset:
            # gevent leaves the file at the number of bytes sent, wherever it began.
            assert got.source_at == start + got.result
            assert got.next_bytes == CONTENT[: self.size][start + got.result :][:7]
            got.source_at, got.next_bytes = wanted.source_at, wanted.next_bytes
        assert got == wanted
        assert grown.pipes_in_use == 0
        if self.reason is not None:
            assert grown.fallbacks == {self.reason: 1}
            assert moved(grown) == 0
            return
        assert grown.fallbacks == {}
        if got.error is not None:
            assert moved(grown) == 0
            return
        assert moved(grown) == got.result == len(got.arrived or b"")
        expected = max(self.size - start, 0)
        if self.count is not None:
            expected = min(expected, self.count)
        assert got.result == expected
        if expected <= SMALL:
            assert grown.bytes_copied == expected
        else:
            read_ahead = 1 << 18 if self.kind.name == "big buffer" else io.DEFAULT_BUFFER_SIZE
            assert grown.bytes_copied <= (read_ahead if self.ahead else 0)
            assert grown.bytes_spliced == expected - grown.bytes_copied
        assert grown.transfers == (1 if expected else 0)


def kinds(all_kinds: tuple[Any, ...], where: Callable[[Any], bool] = lambda kind: True) -> Any:
    return [pytest.param(kind, id=kind.name) for kind in all_kinds if where(kind)]


# --- copyfileobj ---


@dataclasses.dataclass(frozen=True)
class Copy:
    """A call of copyfileobj."""

    source: Source
    sink: Sink
    size: int
    ahead: int = 0
    #: What was done to the sink before: nothing, "pending" writes, "read", "past" its end.
    before: str = "nothing"
    length: Any = 0

    def run(self, bench: Bench, function: Callable[..., Any]) -> Outcome:
        source = bench.keep(self.source.make(bench, CONTENT[: self.size]))
        sink, collect = self.sink.make(bench)
        bench.keep(sink)
        read_before(source, self.ahead)
        self._prepare(sink)
        outcome = Outcome()
        outcome.call(function, source, sink, self.length)
        outcome.source_at, outcome.sink_at = position(source), position(sink)
        outcome.next_bytes = read_on(source)
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            sink.write(AFTER)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sink.close()
        outcome.arrived = collect()
        return outcome

    def _prepare(self, sink: Any) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            if self.before == "pending":
                sink.write(PENDING)
            elif self.before == "past" and sink.seekable():
                sink.seek(len(OLD) + 100 * KiB)
            elif self.before == "read" and sink.seekable():
                sink.read(10)

    @property
    def rest(self) -> int:
        """Return how many bytes there are to copy."""
        return max(self.size - self.ahead, 0)

    @property
    def reasons(self) -> set[str]:
        """Say why the call goes to the original: one of these is counted. None: it does not."""
        if self.length and (type(self.length) is not int or not -1 <= self.length <= 1 << 30):
            return {"arguments"}
        reasons = {self.source.role, self.sink.role} - {FILE, SOCKET, PIPE}
        if self.source.role == FILE and 0 < self.rest <= SMALL:
            reasons.add("small")
        return reasons

    def check(self, open_bench: Callable[[], contextlib.AbstractContextManager[Bench]]) -> None:
        with open_bench() as bench:
            wanted = self.run(bench, unpatched_copyfileobj)
        with open_bench() as bench, counting() as grown:
            got = self.run(bench, shutil.copyfileobj)
        assert grown.pipes_in_use == 0
        if self.reasons:
            assert got == wanted
            assert [*grown.fallbacks.values()] == [1]
            assert grown.fallbacks.keys() <= self.reasons
            assert moved(grown) == 0
            return
        if self.sink.short_writes:
            # The original does not look at what write() returns, and loses what was not taken.
            before = PENDING if self.before == "pending" else b""
            assert len(wanted.arrived) <= len(got.arrived)
            wanted.arrived = before + CONTENT[self.ahead : self.size] + AFTER
        assert got == wanted
        assert got.error is None
        if (self.source.role, self.sink.role) == (FILE, PIPE) and self.rest:
            assert grown.fallbacks == {"file_to_pipe": 1}
            assert moved(grown) == grown.bytes_copied == self.rest
            return
        assert grown.fallbacks == {}
        self._check_way(grown)

    def _check_way(self, grown: SimpleNamespace) -> None:
        assert moved(grown) == self.rest
        assert grown.transfers == (1 if self.rest else 0)
        if self.source.role == FILE:
            fast = grown.bytes_sendfile + grown.bytes_copy_file_range + grown.bytes_spliced
            ahead = self.ahead
        else:
            # A buffer that is empty answers only after it has read once.
            fast = grown.bytes_spliced
            ahead = "raw" not in self.source.name
        read_ahead = 1 << 18 if self.source.name == "big buffer" else io.DEFAULT_BUFFER_SIZE
        assert grown.bytes_copied <= (read_ahead if ahead else 0)
        assert fast == self.rest - grown.bytes_copied
        borrowed = grown.acquired_local + grown.acquired_global + grown.acquired_new
        from_socket = self.source.role == SOCKET and self.sink.role != PIPE
        across_filesystems = self.source.role == FILE and grown.bytes_spliced
        assert bool(borrowed) == bool(from_socket or across_filesystems)


def copy_of(
    source: Source,
    sink: Sink,
    size: int,
    ahead: int = 0,
    before: str = "nothing",
    length: Any = 0,
) -> Copy:
    """Return a case that the original function gets through in a time and without blocking."""
    size = min(size, source.most, sink.most - len(PENDING))
    if length in (1, True):
        size = min(size, 2000)
    case = Copy(source, sink, size, min(ahead, size), before, length)
    if case.reasons and sink.short_writes:  # how short depends on who reads meanwhile
        case = dataclasses.replace(case, size=min(size, FITS // 2))
        case = dataclasses.replace(case, ahead=min(case.ahead, case.size))
    return case


def kind_named(all_kinds: tuple[Any, ...], name: str) -> Any:
    return next(kind for kind in all_kinds if kind.name == name)
