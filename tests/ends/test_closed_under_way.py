"""What is raised, and in which words, when another greenlet closes an end of a transfer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, file_of, receive_all
from ends import GUARD, Ends, MiB, is_waited_for, until
from gevent.fileobject import FileObjectBlock, FileObjectPosix
from gevent.monkey import get_original

SIZE = 8 * MiB

sendfile = {
    "original": lambda *args: get_original("gevent._socket3.socket", "sendfile")(*args),
    "gsplice": lambda *args: gevent.socket.socket.sendfile(*args),
}
copyfileobj = {
    "original": lambda *args: get_original("shutil", "copyfileobj")(*args),
    "gsplice": lambda *args: shutil.copyfileobj(*args),
}


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with Ends(tmp_path, buffers=16 * 1024) as made, gevent.Timeout(GUARD):
        yield made


def named(directory: Path, mode: str) -> Any:
    file = tempfile.NamedTemporaryFile(mode, dir=directory)
    file.truncate(SIZE)
    return file


FILES: dict[str, Callable[[Path], Any]] = {
    "raw": lambda path: path.open("r+b", buffering=0),
    "buffered random": lambda path: path.open("r+b"),
    "gevent's blocking": lambda path: FileObjectBlock(str(path), "r+b"),
    "temporary": lambda path: named(path.parent, "w+b"),
}
# libuv can't poll a regular file, and gevent 24's own sendfile() calls this one a text file.
if "libuv" not in gevent.config.loop.__module__ and gevent.version_info >= (25,):
    FILES["gevent's"] = lambda path: FileObjectPosix(os.open(path, os.O_RDWR), "r+b")
SOURCES = {"buffered": lambda path: path.open("rb"), **FILES}
SINKS = {"buffered": lambda path: path.open("wb"), **FILES}

#: The streams, and the buffering of their file objects.
STREAMS = [("unix", 0), ("unix", -1), ("pipe", 0), ("pipe", -1)]


def words(function: Callable[..., Any], *args: Any) -> tuple[type[BaseException], int | None, str]:
    """Return what *function* raises: the class, the number and the text."""
    with pytest.raises((OSError, ValueError)) as caught:
        function(*args)
    return caught.type, getattr(caught.value, "errno", None), str(caught.value)


@pytest.mark.few
@pytest.mark.parametrize("mover", ["sendfile", "raw", "buffered"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_file_that_goes_to_a_socket(ends: Ends, source: str, mover: str) -> None:
    def attempt(which: str) -> Any:
        file = SOURCES[source](file_of(ends.path(), SIZE))
        ours, theirs = ends.connect("tcp")
        if mover == "sendfile":
            sending = ends.spawn(words, sendfile[which], ours, file)
        else:
            sink = ours.makefile("wb", 0 if mover == "raw" else -1)
            sending = ends.spawn(words, copyfileobj[which], file, sink)
        theirs.recv(1)
        until(lambda: is_waited_for(ours))
        file.close()
        ends.spawn(receive_all, theirs)
        return sending.get()

    wanted = attempt("original")
    with counting() as grown:
        assert attempt("gsplice") == wanted
    assert grown.bytes_spliced > 0
    assert grown.fallbacks == {}


def stream(ends: Ends, kind: str, buffering: int) -> tuple[Any, Callable[[bytes], Any]]:
    """Return a file object to read from, and what has it get bytes."""
    if kind == "pipe":
        reader, writer = ends.pipe(buffering)
        return reader, lambda data: (writer.write(data), writer.flush())
    ours, theirs = ends.connect(kind)
    return ours.makefile("rb", buffering), theirs.sendall


@pytest.mark.few
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize(("kind", "buffering"), STREAMS)
def test_a_file_that_is_written(ends: Ends, sink: str, kind: str, buffering: int) -> None:
    def attempt(which: str) -> Any:
        src, feed = stream(ends, kind, buffering)
        file = SINKS[sink](file_of(ends.path(), 0))
        copying = ends.spawn(words, copyfileobj[which], src, file)
        gevent.idle()
        gevent.sleep(0)
        file.close()
        ends.spawn(feed, bytes(MiB))
        return copying.get()

    wanted = attempt("original")
    with counting() as grown:
        assert attempt("gsplice") == wanted
    assert "source_type" not in grown.fallbacks
    assert "destination_type" not in grown.fallbacks


@pytest.mark.few
@pytest.mark.parametrize("victim", ["source", "sink"])
@pytest.mark.parametrize("sink", STREAMS)
@pytest.mark.parametrize("source", STREAMS)
def test_a_stream(ends: Ends, source: Any, sink: Any, victim: str) -> None:
    """It is closed while the source is waited for."""

    def attempt(which: str) -> Any:
        src, feed = stream(ends, *source)
        if sink[0] == "pipe":
            dst = ends.pipe(sink[1])[1]
        else:
            ours, _ = ends.connect(sink[0])
            dst = ours.makefile("wb", sink[1])
        copying = ends.spawn(words, copyfileobj[which], src, dst)
        gevent.idle()
        gevent.sleep(0)
        try:
            (src if victim == "source" else dst).close()
        except RuntimeError:  # it is in use
            return None
        ends.spawn(feed, bytes(MiB))
        return copying.get()

    wanted = attempt("original")
    if wanted is not None:
        assert attempt("gsplice") == wanted
