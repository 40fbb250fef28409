"""What a call of ``copyfileobj`` costs that gsplice cannot help: its own time over the original's.

The two sides take turns call by call, on objects made alike and outside of the measured time. The
difference of the least of each is what the code costs, and is held to the bound; that of the
medians is given beside it.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent.monkey

if __name__ == "__main__":
    gevent.monkey.patch_all()

import socket
import ssl

import gevent
from _measure import KiB, MiB, Report, no_collections
from _words import in_words
from gevent.pywsgi import Input

import gsplice

#: Microseconds that a call may take longer than unpatched.
MOST = 2.0

#: A little more or less than what a page, or a buffer, holds.
FEW = 1000

COLD = "The code is cold in the processor's caches: in a loop of its own the call takes 1 us more"
ASKED = "One system call says that no disk is waited for, another to which filesystem the bytes go"
CAUSES = dict.fromkeys(
    [
        "file to file, 1,000 bytes",
        "file to file, 4 KiB",
        "file to file, 64 KiB",
        "raw file to raw file, 1,000 bytes",
        "file to socket file, 1,000 bytes",
        "file to socket file, 64 KiB",
    ],
    ASKED,
)

stock_copy: Callable[..., None] = shutil.copyfileobj  # gsplice patches nothing here

Pair = tuple[Any, Any]


class Subclass(io.BufferedReader):
    """A file that might read in another way."""


class Kinds:
    """Makes, for each kind of pair, what one call copies from and to."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._kept = contextlib.ExitStack()

    def all(self) -> dict[str, Callable[[], Pair]]:
        """Return the kinds by name. Each is called before every call, and not measured."""
        target, memory, text = self._file("target", 0, "wb"), io.BytesIO(), io.StringIO
        compressed = self._folder / "compressed"
        compressed.write_bytes(gzip.compress(bytes(FEW)))
        page, small, big = (self._file(str(n), n) for n in (FEW, 4 * KiB, 64 * KiB))
        raw = self._stack.enter_context((self._folder / str(FEW)).open("rb", 0))
        raw_target = self._stack.enter_context((self._folder / "raw").open("wb", 0))
        subclass = Subclass(io.FileIO(self._folder / str(FEW)))
        unzipped = self._stack.enter_context(gzip.GzipFile(compressed))

        def again(src: Any, dst: Any) -> Callable[[], Pair]:
            def rewind() -> Pair:
                src.seek(0)
                dst.seek(0)
                return src, dst

            return rewind

        def to_file(make: Callable[..., Any], *args: Any) -> Callable[[], Pair]:
            return lambda: (make(*args), again(memory, target)()[1])

        kinds = {
            "BytesIO to BytesIO": again(io.BytesIO(bytes(FEW)), memory),
            "StringIO to StringIO": again(text("x" * FEW), text()),
            "BytesIO to file": again(io.BytesIO(bytes(FEW)), target),
            "file to BytesIO": again(page, memory),
            "gzip to file": again(unzipped, target),
            "subclass to file": again(subclass, target),
            "file to file, 1,000 bytes": again(page, target),
            "file to file, 4 KiB": again(small, target),
            "file to file, 64 KiB": again(big, target),
            "raw file to raw file, 1,000 bytes": again(raw, raw_target),
            "file to socket file, 1,000 bytes": lambda: (again(page, memory)()[0], self._wfile()),
            "file to socket file, 64 KiB": lambda: (again(big, memory)()[0], self._wfile()),
            "TLS response to file": to_file(self._tls_response),
            "chunked response to file": to_file(self._response, None),
            "response to BytesIO": lambda: (self._response(FEW), again(memory, memory)()[1]),
            "pywsgi upload to file": to_file(self._pywsgi),
        }
        for size in (FEW, 4 * KiB, 64 * KiB, MiB):
            kinds[f"response of {in_words(size)} to file"] = to_file(self._response, size)
        if "gunicorn" in sys.modules:
            kinds["gunicorn upload to file"] = to_file(self._gunicorn)
        if "werkzeug" in sys.modules:
            kinds["werkzeug upload to file"] = to_file(self._werkzeug)
        return kinds

    def drop(self) -> None:
        """Close what was made for the last call."""
        self._kept.close()

    def _file(self, name: str, size: int, mode: str = "rb") -> Any:
        path = self._folder / name
        path.write_bytes(os.urandom(size))
        return self._stack.enter_context(path.open(mode))

    def _received(self, data: bytes) -> Any:
        """Return a socket that has received *data*, and no more to come."""
        ours, theirs = socket.socketpair()
        self._kept.callback(ours.close)
        theirs.sendall(data)
        theirs.close()
        return ours

    def _wfile(self) -> Any:
        ours, theirs = socket.socketpair()
        self._kept.callback(ours.close)
        self._kept.callback(theirs.close)
        return self._kept.enter_context(ours.makefile("wb"))

    def _response(self, size: int | None) -> Any:
        """Return a response, of which at most 64 KiB have come: more is not what is measured."""
        if size is None:
            head, body = b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (FEW, bytes(FEW))
        else:
            head, body = b"Content-Length: %d" % size, bytes(min(size, 64 * KiB))
        return self._begun(self._received(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (head, body)))

    def _begun(self, sock: Any) -> Any:
        response = http.client.HTTPResponse(sock)
        response.begin()
        self._kept.callback(response.close)
        return response

    def _tls_response(self) -> Any:
        """Return one that says it has more than is small, so that its length does not decide."""
        ours, theirs = socket.socketpair()
        server = gevent.spawn(tls(ssl.PROTOCOL_TLS_SERVER).wrap_socket, theirs, server_side=True)
        client = tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(ours)
        with server.get() as peer:
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (2 * MiB) + bytes(FEW))
        self._kept.callback(client.close)
        return self._begun(client)

    def _pywsgi(self) -> Any:
        rfile = self._kept.enter_context(self._received(bytes(FEW)).makefile("rb"))
        return Input(rfile, FEW)

    def _gunicorn(self) -> Any:
        from gunicorn.http.body import Body, LengthReader
        from gunicorn.http.unreader import SocketUnreader

        return Body(LengthReader(SocketUnreader(self._received(bytes(FEW))), FEW))

    def _werkzeug(self) -> Any:
        from werkzeug.wsgi import LimitedStream

        return LimitedStream(self._pywsgi(), FEW)


def tls(protocol: int) -> Any:
    """Return a context for connections without certificates, as both ends are here."""
    context = ssl.SSLContext(protocol)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")
    return context


def compared(kinds: Kinds, fresh: Callable[[], Pair], calls: int) -> list[list[float]]:
    """Return the microseconds of CPU that each call took: of the original, and of gsplice's."""
    times: list[list[float]] = [[], []]
    copies = (stock_copy, gsplice.copyfileobj)
    with no_collections():
        for number in range(2 * calls):
            side = (number ^ (number >> 1)) & 1  # A B B A
            src, dst = fresh()
            copy = copies[side]
            begin = time.process_time()
            copy(src, dst)
            times[side].append((time.process_time() - begin) * 1e6)
            kinds.drop()
    return times


def main() -> None:
    report = Report(__doc__)
    for name in ("gunicorn.http.body", "werkzeug.wsgi"):
        try:
            __import__(name)
        except ImportError:
            report.leave_out(f"uploads of {name.partition('.')[0]}", "it is not installed")
    calls = report.pick(1000, 100, 2)
    rows = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, contextlib.ExitStack() as stack:
        kinds = Kinds(Path(folder), stack)
        for name, fresh in kinds.all().items():
            compared(kinds, fresh, calls // 10 + 1)
            stock, ours = compared(kinds, fresh, calls)
            more = statistics.median(ours) - statistics.median(stock)
            least = min(ours) - min(stock)
            target = report.target(
                f"{name}: us more than unpatched",
                least,
                most=MOST,
                cause=CAUSES.get(name, COLD),
                cost=True,
            )
            rows.append([name, statistics.median(stock), more, least, target])
    head = ["", "unpatched, us of CPU", "more with gsplice", "of the least of each", "target"]
    report.table(f"One call, medians of {calls}", head, rows)
    report.close()


if __name__ == "__main__":
    main()
