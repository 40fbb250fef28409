"""Request bodies that are files: what arrives, and what is left, as unpatched."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
import requests
import urllib3
from conftest import counting, file_of, some_bytes
from django.core.files.base import File as DjangoFile
from ends import GUARD, KiB, MiB
from gevent.monkey import get_original
from unpatched import unpatched as everything_unpatched

import gsplice
from gsplice._patches import http_client

SIZE = 3 * MiB + 5
CONTENT = some_bytes(SIZE)

#: The classes, and the names that are replaced in them.
REPLACED = (
    (http.client.HTTPConnection, "http.client.HTTPConnection", http_client.NAMES),
    (
        urllib3.connection.HTTPConnection,
        "urllib3.connection.HTTPConnection",
        http_client.URLLIB3_NAMES,
    ),
)


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for cls, full_name, names in REPLACED:
            for name in names:
                patch.setattr(cls, name, get_original(full_name, name))
        yield


class Server:
    """Takes requests, and answers each when its body is complete."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.listener = gevent.socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        self._serving = gevent.spawn(self._accept)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.kill()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            gevent.spawn(self._serve, sock)

    def _serve(self, sock: Any) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sock):
            while self._serve_one(sock):
                pass

    def _serve_one(self, sock: Any) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(1 << 16)
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        lines = [line.lower() for line in head.split(b"\r\n")]
        length = next(
            (int(line.split(b":")[1]) for line in lines if line.startswith(b"content-l")), None
        )
        pieces = [body]
        left = None if length is None else length - len(body)
        while left != 0:
            if left is None and b"".join(pieces[-2:]).endswith(b"0\r\n\r\n"):
                break
            piece = sock.recv(1 << 20)
            if not piece:
                break
            pieces.append(piece)
            left = None if left is None else left - len(piece)
        self.received.append(head + b"\r\n\r\n" + b"".join(pieces))
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return True


def connect(server: Server) -> http.client.HTTPConnection:
    made = http.client.HTTPConnection("127.0.0.1", server.port)
    made._create_connection = gevent.socket.create_connection  # type: ignore[attr-defined]
    return made


def by_http_client(server: Server, body: Any, **headers: str) -> None:
    made = connect(server)
    made.request("PUT", "/", body, {"Host": "x", **headers})
    assert made.getresponse().read() == b"ok"
    made.close()


def by_send(server: Server, body: Any, **headers: str) -> None:
    made = connect(server)
    made.putrequest("PUT", "/", skip_host=True)
    for name, value in headers.items():
        made.putheader(name, value)
    made.endheaders()
    made.send(body)
    assert made.getresponse().read() == b"ok"
    made.close()


class GeventPool(urllib3.HTTPConnectionPool):
    class ConnectionCls(urllib3.connection.HTTPConnection):
        """As it connects after gevent.monkey.patch_all()."""

        def _new_conn(self) -> Any:
            return gevent.socket.create_connection((self.host, self.port))


def by_urllib3(server: Server, body: Any, **headers: str) -> None:
    with GeventPool("127.0.0.1", server.port) as pool:
        answer = pool.urlopen("PUT", "/", body, {"Host": "x", **headers}, retries=False)
        assert answer.data == b"ok"


def by_requests(server: Server, body: Any, **headers: str) -> None:
    with pytest.MonkeyPatch.context() as patch, requests.Session() as session:
        patch.setattr(urllib3.HTTPConnectionPool, "ConnectionCls", GeventPool.ConnectionCls)
        url = f"http://127.0.0.1:{server.port}/"
        assert session.put(url, data=body, headers={"Host": "x", **headers}).content == b"ok"


def by_urllib(server: Server, body: Any, **headers: str) -> None:
    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(lambda host, **_: connect(server), request)

    url = f"http://127.0.0.1:{server.port}/"
    request = urllib.request.Request(url, body, {"Host": "x", **headers}, method="PUT")
    with urllib.request.build_opener(Handler).open(request) as answer:
        assert answer.read() == b"ok"


CLIENTS: dict[str, Callable[..., None]] = {
    "http.client": by_http_client,
    "send": by_send,
    "urllib": by_urllib,
    "urllib3": by_urllib3,
    "requests": by_requests,
}


def named(path: Path) -> Any:
    file = tempfile.NamedTemporaryFile()
    file.write(CONTENT)
    file.seek(0)
    return file


def at_a_position(path: Path) -> Any:
    file = path.open("rb")
    file.read(1000)
    return file


def of_another_mode(path: Path) -> Any:
    file = DjangoFile(path.open("rb"))
    file.mode = "r"
    return file


#: Files that go by the kernel, and how many of their bytes there are to send.
FILES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "file": (lambda path: path.open("rb"), SIZE),
    "raw": (lambda path: path.open("rb", 0), SIZE),
    "read and write": (lambda path: path.open("r+b"), SIZE),
    "at a position": (at_a_position, SIZE - 1000),
    "NamedTemporaryFile": (named, SIZE),
    "Django": (lambda path: DjangoFile(path.open("rb")), SIZE),
    "of another mode": (of_another_mode, SIZE),
}


class OwnRead(io.FileIO):
    """A file that is read in its own way."""

    def read(self, size: int = -1) -> bytes:
        return super().read(size).swapcase()


#: Bodies that are read as before.
OTHERS: dict[str, Callable[[Path], Any]] = {
    "BytesIO": lambda path: io.BytesIO(CONTENT),
    "bytes": lambda path: CONTENT,
    "subclass": lambda path: OwnRead(path),
    "at its end": lambda path: file_at_end(path),
}


def file_at_end(path: Path) -> Any:
    file = path.open("rb")
    file.seek(0, io.SEEK_END)
    return file


def seen(client: str, body: Any, **headers: str) -> tuple[bytes, object]:
    """Return what has arrived, and where the body stands then."""
    with Server() as server:
        gevent.spawn(CLIENTS[client], server, body, **headers).get(timeout=GUARD)
        assert len(server.received) == 1
        return server.received[0], body.tell() if hasattr(body, "tell") else None


def both(client: str, make: Callable[[Path], Any], path: Path, **headers: str) -> Any:
    """Pass if patched and unpatched are alike; return the counters of the patched one."""
    with unpatched():
        body = make(path)
        wanted = seen(client, body, **headers)
    body = make(path)
    with counting() as grown:
        got = seen(client, body, **headers)
    assert got == wanted
    return grown


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_file_goes_by_splice(tmp_path: Path, client: str, kind: str) -> None:
    path = file_of(tmp_path / "body", SIZE)
    make, size = FILES[kind]
    grown = both(client, make, path, **{"Content-Length": str(size)})
    assert grown.bytes_spliced >= 0.95 * size
    assert grown.bytes_spliced + grown.bytes_copied == size
    assert grown.fallbacks == {}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("client", CLIENTS)
def test_other_bodies_go_as_before(tmp_path: Path, client: str, kind: str) -> None:
    path = file_of(tmp_path / "body", SIZE)
    size = 0 if kind == "at its end" else SIZE
    grown = both(client, OTHERS[kind], path, **{"Content-Length": str(size)})
    assert grown.transfers == 0


@pytest.mark.parametrize("client", ["http.client", "urllib", "urllib3"])
def test_a_chunked_body_goes_as_before(tmp_path: Path, client: str) -> None:
    path = file_of(tmp_path / "body", SIZE)
    grown = both(client, lambda path: path.open("rb"), path)
    assert grown.transfers == 0


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_a_text_file_is_encoded_as_before(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"text " * 100_000)
    grown = both("http.client", lambda path: path.open(mode), path, **{"Content-Length": "500000"})
    assert grown.transfers == (mode == "rb")


def test_a_connection_that_wants_to_see_the_pieces(tmp_path: Path) -> None:
    path = file_of(tmp_path / "body", SIZE)
    pieces: list[int] = []

    class Counting(http.client.HTTPConnection):
        def send(self, data: Any) -> None:
            pieces.append(len(data))
            super().send(data)

    with Server() as server, counting() as grown:
        made = Counting("127.0.0.1", server.port)
        made._create_connection = gevent.socket.create_connection  # type: ignore[attr-defined]
        with path.open("rb") as body:
            made.request("PUT", "/", body, {"Content-Length": str(SIZE)})
        assert made.getresponse().read() == b"ok"
        made.close()
    assert sum(pieces[1:]) == SIZE
    assert max(pieces) <= 64 * KiB
    assert grown.transfers == 0


#: Methods that programs wrap, to log or to trace, and the clients that call them with a body.
WRAPPED: dict[str, tuple[type, str]] = {
    "send": (http.client.HTTPConnection, "send"),
    "_send_output": (http.client.HTTPConnection, "_send_output"),
    "urllib3's request": (urllib3.connection.HTTPConnection, "request"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("client", ["http.client", "send", "urllib3"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_of_a_method_sees_what_it_saw(
    tmp_path: Path, client: str, name: str, when: str
) -> None:
    """Whether somebody has wrapped it before gsplice has replaced it, or after."""
    path = file_of(tmp_path / "body", SIZE)
    cls, method = WRAPPED[name]

    @contextlib.contextmanager
    def wrapped() -> Iterator[list[list[type]]]:
        calls = []
        original = getattr(cls, method)

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **options: Any) -> Any:
            calls.append([type(each) for each in (*args, *options.values())])
            return original(self, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, method, wrapper)
            yield calls

    def send_it() -> None:
        with Server() as server, path.open("rb") as body:
            CLIENTS[client](server, body, **{"Content-Length": str(SIZE)})
            assert server.received[0].endswith(CONTENT)

    if when == "after":
        with wrapped() as ours:
            send_it()
    else:
        with everything_unpatched(), wrapped() as ours:
            gsplice.patch_all()
            send_it()
            gsplice.unpatch_all()
    with everything_unpatched(), wrapped() as wanted:
        send_it()
    assert ours == wanted


def test_debug_output_is_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path / "body", 100 * KiB)

    def send_it() -> str:
        with Server() as server, path.open("rb") as body:
            made = connect(server)
            made.set_debuglevel(1)
            made.request("PUT", "/", body, {"Host": "x", "Content-Length": str(100 * KiB)})
            assert made.getresponse().read() == b"ok"
            made.close()
        return capsys.readouterr().out

    with unpatched():
        wanted = send_it()
    assert send_it() == wanted
    assert "sending a readable" in wanted or "send:" in wanted


def test_an_audit_hook_sees_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path / "body", SIZE)
    events: list[Any] = []
    listening = True

    def hook(event: str, args: Any) -> None:
        if listening and event == "http.client.send":
            events.append(args[1])

    sys.addaudithook(hook)
    with Server() as server, path.open("rb") as body:
        by_http_client(server, body, **{"Content-Length": str(SIZE)})
        listening = False
        assert events[-1] is body


def test_a_retry_rewinds_and_sends_all_again(tmp_path: Path) -> None:
    path = file_of(tmp_path / "body", SIZE)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server())
        first = stack.enter_context(gevent.socket.socket())
        first.bind(("127.0.0.1", 0))
        first.listen()
        ports = iter([first.getsockname()[1], server.port])

        class Moving(urllib3.connection.HTTPConnection):
            def _new_conn(self) -> Any:
                return gevent.socket.create_connection((self.host, next(ports)))

        def break_off() -> None:
            sock, _ = first.accept()
            received = 0
            while received < 1 * MiB:
                received += len(sock.recv(1 << 16))
            sock.close()

        gevent.spawn(break_off)
        pool = stack.enter_context(urllib3.HTTPConnectionPool("127.0.0.1", 1))
        pool.ConnectionCls = Moving  # type: ignore[assignment]
        body = stack.enter_context(path.open("rb"))
        answer = gevent.spawn(
            pool.urlopen,
            "PUT",
            "/",
            body,
            {"Content-Length": str(SIZE)},
            retries=urllib3.Retry(1, allowed_methods=None),
        ).get(timeout=GUARD)
        assert answer.data == b"ok"
        assert server.received[0].partition(b"\r\n\r\n")[2] == CONTENT


@pytest.mark.parametrize("client", ["http.client", "urllib3"])
def test_a_server_that_stops_reading_and_closes(tmp_path: Path, client: str) -> None:
    """The error, its class and number are those of the pieces."""
    path = file_of(tmp_path / "body", 32 * MiB)

    def error() -> tuple[type, object]:
        with gevent.socket.socket() as listener, path.open("rb") as body:
            listener.bind(("127.0.0.1", 0))
            listener.listen()

            def close_early() -> None:
                sock, _ = listener.accept()
                assert sock.recv(1000)
                sock.close()

            gevent.spawn(close_early)
            fake: Any = type("Fake", (), {"port": listener.getsockname()[1]})
            with pytest.raises((OSError, urllib3.exceptions.HTTPError)) as caught:
                CLIENTS[client](fake, body, **{"Content-Length": str(32 * MiB)})
            return type(caught.value), getattr(caught.value, "errno", None)

    with unpatched():
        wanted = {error() for _ in range(5)}
    assert error() in wanted | {(ConnectionResetError, 104), (BrokenPipeError, 32)}


def test_its_switch() -> None:
    gsplice.unpatch_all()
    try:
        result = gsplice.patch_all(http_client=False)
        assert not any("HTTPConnection" in name for name in result.patched)
        result = gsplice.patch_all()
        assert "http.client.HTTPConnection.send" in result.patched
        assert "urllib3.HTTPConnection.request" in result.patched
    finally:
        gsplice.patch_all()
