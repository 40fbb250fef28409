"""Responses of gevent.pywsgi that are files: a real server, and raw bytes from the wire."""

from __future__ import annotations

import gzip
import http.client
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import gevent.socket
import gevent.ssl
import pytest
from conftest import counting, file_of, receive_all, some_bytes
from ends import GUARD
from falcon.routing.static import _BoundedFile
from gevent import pywsgi
from slowfs import SlowFS
from unpatched import unpatched as nothing_patched
from wsgi import App, file_app, request, split, unpatched

from gsplice._patches.pywsgi import FileWrapper

BIG = 3 * 1024 * 1024 + 17


@pytest.mark.few
@pytest.mark.parametrize("size", [BIG, 100_000, 1000, 1])
@pytest.mark.parametrize("declared", [True, False])
def test_a_file_goes_out_whole_with_its_length(
    serve: Any, tmp_path: Path, size: int, declared: bool
) -> None:
    path = file_of(tmp_path / "f", size)
    length = [("Content-Length", str(size))] if declared else []
    server = serve(file_app(path, *length))
    with counting() as grown:
        status, headers, body = split(server.ask(request()))
    assert status == "HTTP/1.1 200 OK"
    assert body == path.read_bytes()
    assert headers["Content-Length"] == str(size)
    assert "Transfer-Encoding" not in headers
    assert grown.bytes_spliced + grown.bytes_copied == size
    assert grown.transfers == 1
    assert (grown.bytes_spliced > 0) == (size > 65536)
    assert grown.fallbacks == {}
    assert server.errors.getvalue() == ""


def test_headers_are_those_that_pywsgi_makes(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    app = file_app(path, ("Content-Length", str(BIG)), ("X-Own", "1"), ("Date", "never"))
    ours = serve(app).ask(request())
    theirs = serve(unpatched(app)).ask(request())
    assert ours == theirs


def test_it_starts_where_the_file_stands(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    _, headers, body = split(serve(file_app(path, start=1_000_001)).ask(request()))
    assert body == path.read_bytes()[1_000_001:]
    assert headers["Content-Length"] == str(BIG - 1_000_001)


def test_a_file_at_its_end_is_an_empty_body(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    status, headers, body = split(serve(file_app(path, start=BIG)).ask(request()))
    assert (status, headers["Content-Length"], body) == ("HTTP/1.1 200 OK", "0", b"")


def test_the_body_is_cut_to_the_declared_length_and_the_connection_kept(
    serve: Any, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "f", BIG)
    server = serve(file_app(path, ("Content-Length", "1000000"), start=5))
    with counting() as grown:
        both = server.ask(request(close=False), request())
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert split(first)[2] == split(second)[2] == path.read_bytes()[5:1_000_005]
    assert grown.bytes_spliced + grown.bytes_copied == 2_000_000


def test_a_file_shorter_than_declared_ends_the_connection(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    server = serve(file_app(path, ("Content-Length", str(BIG + 1))))
    answer = server.ask(request(close=False), request(close=False))
    assert split(answer)[2] == path.read_bytes()


def test_head_has_the_headers_and_no_body(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    server = serve(file_app(path))
    with counting() as grown:
        answer = server.ask(request("HEAD", close=False), request("HEAD"))
    first, second, rest = answer.split(b"\r\n\r\n")
    assert f"Content-Length: {BIG}".encode() in first
    assert b"HTTP/1.1 200 OK" in second
    assert rest == b""
    assert grown.transfers == 0


@pytest.mark.parametrize("status", ["304 Not Modified", "204 No Content"])
def test_a_response_without_a_body_is_pywsgis_business(
    serve: Any, tmp_path: Path, status: str
) -> None:
    path = file_of(tmp_path / "empty", 0)
    with counting() as grown:
        answer = split(serve(file_app(path, status=status)).ask(request()))
    assert answer[0] == f"HTTP/1.1 {status}"
    assert answer[2] == b""
    assert grown.transfers == 0


@pytest.mark.parametrize("keep", [True, False])
def test_http_1_0(serve: Any, tmp_path: Path, keep: bool) -> None:
    path = file_of(tmp_path / "f", 200_000)
    app = file_app(path, ("Content-Length", "200000"), ("Date", "never"))
    asked = request("GET", *["Connection: keep-alive"] * keep, version="1.0")
    last = request("GET", version="1.0")
    with counting() as grown:
        ours = serve(app).ask(asked, last)
    assert ours == serve(unpatched(app)).ask(asked, last)
    assert ours.count(b"HTTP/1.1 200 OK") == 1 + keep
    assert grown.bytes_spliced == 200_000 * (1 + keep)


@pytest.mark.parametrize("how", ["gzip", "bytes", "pipe"])
def test_anything_but_a_plain_file_goes_as_before(serve: Any, tmp_path: Path, how: str) -> None:
    content = some_bytes(200_000)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Date", "never")])
        if how == "gzip":
            (tmp_path / "f").write_bytes(gzip.compress(content))
            file: Any = gzip.open(tmp_path / "f")
        elif how == "bytes":
            file = io.BytesIO(content)
        else:
            file = subprocess.Popen(["cat", str(tmp_path / "g")], stdout=subprocess.PIPE).stdout
        return environ["wsgi.file_wrapper"](file)

    (tmp_path / "g").write_bytes(content)
    with counting() as grown:
        ours = serve(app).ask(request())
    assert b"Transfer-Encoding: chunked" in ours
    assert grown.transfers == 0
    assert grown.fallbacks == {"source_type": 1}
    assert ours == serve(unpatched(app)).ask(request())


def test_anything_else_is_cut_to_the_declared_length_too(serve: Any) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", "100000")])
        return environ["wsgi.file_wrapper"](io.BytesIO(bytes(200_000)), 65536)

    both = serve(app).ask(request(close=False), request(close=False), request())
    assert both.count(b"HTTP/1.1 200 OK") == 3
    assert both.count(0) == 300_000


def test_a_file_of_unknown_size_is_chunked(serve: Any) -> None:
    server = serve(file_app(Path("/proc/self/status")))
    _, headers, body = split(server.ask(request()))
    assert headers["Transfer-Encoding"] == "chunked"
    assert b"VmRSS" in body
    assert body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("opening", [{}, {"buffering": 0}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_file_is_closed(serve: Any, tmp_path: Path, method: str, opening: Any) -> None:
    opened = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [])
        opened.append(file_of(tmp_path / "f", BIG).open("rb", **opening))
        return environ["wsgi.file_wrapper"](opened[0])

    serve(app).ask(request(method))
    assert opened[0].closed


def test_a_client_that_goes_away_is_noted_as_pywsgi_notes_it(serve: Any, tmp_path: Path) -> None:
    opened = []
    noted = []
    path = file_of(tmp_path / "f", 50 * 1024 * 1024)

    class Handler(pywsgi.WSGIHandler):
        def log_request(self) -> None:
            noted.append((self.status, self.code, self.close_connection, self.response_length))
            super().log_request()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [])
        opened.append(path.open("rb"))
        return environ["wsgi.file_wrapper"](opened[0])

    server = serve(app, Handler)
    with counting() as grown:
        with server.connect() as sock:
            sock.sendall(request().encode())
            sock.recv(1)
        while not noted:
            gevent.sleep(0.001)
    status, code, closing, length = noted[0]
    assert status.startswith("socket error: [Errno ")
    assert (code, closing) == (-200, True)
    assert grown.bytes_spliced < length < grown.bytes_spliced + 500  # and the headers
    assert opened[0].closed
    assert server.errors.getvalue() == ""


def test_the_access_log_counts_the_bytes(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    logs = []
    app = file_app(path, ("Content-Length", str(BIG)))
    for each in (app, unpatched(app)):
        server = serve(each)
        answer = server.ask(request())
        logs.append(server.log.getvalue().split('"')[2].split()[:2])
        assert logs[-1] == ["200", str(len(answer))]
    assert logs[0] == logs[1]


def segments(server: Any, size: int) -> int:
    """Return how many segments with data a client has received when it has *size* bytes of body."""
    with server.connect() as sock:
        sock.sendall(request(close=False).encode())
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < size:
            received += sock.recv(65536)
        info = sock.getsockopt(gevent.socket.IPPROTO_TCP, 11, 232)  # TCP_INFO, tcpi_data_segs_in
        return int.from_bytes(info[152:156], sys.byteorder)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_headers_and_file_share_a_segment(serve: Any, tmp_path: Path, size: int) -> None:
    """pywsgi sends the headers first, and what it was given then."""
    path = file_of(tmp_path / "f", size)
    length = ("Content-Length", str(size))

    def all_at_once(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [length])
        return [path.read_bytes()]

    def in_ten(app: Any) -> int:
        server = serve(app)
        return sum(segments(server, size) for _ in range(10))

    ours = in_ten(file_app(path, length))
    with nothing_patched():
        # One less each time, but for those that are split on the way: the client may be slow.
        assert ours <= in_ten(all_at_once) - 5


@pytest.mark.parametrize("size", [1000, BIG])
def test_the_end_of_a_file_waits_for_no_acknowledgement(
    serve: Any, tmp_path: Path, size: int
) -> None:
    """A kept-alive connection answers the next request, whatever the one before was."""
    undelayed = []
    path = file_of(tmp_path / "f", size)
    plain = file_app(path, ("Content-Length", str(size)))

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        sock = environ["wsgi.input"].rfile.raw._sock
        for option in (gevent.socket.TCP_NODELAY, gevent.socket.TCP_CORK):
            undelayed.append(bool(sock.getsockopt(gevent.socket.IPPROTO_TCP, option)))
        return plain(environ, start_response)

    serve(app).ask(request(close=False), request("HEAD", close=False), request())
    assert undelayed == [True, False] * 3


def test_a_handler_that_overrides_the_way_out_sees_every_byte(serve: Any, tmp_path: Path) -> None:
    seen = []

    class Handler(pywsgi.WSGIHandler):
        def _sendall(self, data: bytes) -> None:
            seen.append(bytes(data))
            super()._sendall(data)

    path = file_of(tmp_path / "f", BIG)
    with counting() as grown:
        answer = serve(file_app(path), Handler).ask(request())
    assert b"".join(seen) == answer
    assert grown.transfers == 0
    assert grown.fallbacks == {"response": 1}


def test_a_handler_that_overrides_what_calls_us_keeps_working(serve: Any, tmp_path: Path) -> None:
    class Handler(pywsgi.WSGIHandler):
        def get_environ(self) -> Any:
            return {**super().get_environ(), "wsgi.file_wrapper": lambda file: iter([b"mine"])}

        def run_application(self) -> None:
            self.provided = True
            super().run_application()

        def process_result(self) -> None:
            assert self.provided
            super().process_result()

    path = file_of(tmp_path / "f", BIG)
    assert split(serve(file_app(path), Handler).ask(request()))[2] == b"4\r\nmine\r\n0\r\n\r\n"


def test_a_wrapper_that_is_there_is_not_replaced(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", 10)
    server = serve(file_app(path))
    server.server.environ["wsgi.file_wrapper"] = lambda file: iter([b"theirs"])
    assert b"theirs" in server.ask(request())


def test_bytes_written_before_the_file_go_before_it(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        write = start_response("200 OK", [("Content-Length", str(BIG + 3))])
        write(b"abc")
        return environ["wsgi.file_wrapper"](path.open("rb"))

    assert split(serve(app).ask(request()))[2] == b"abc" + path.read_bytes()


def test_an_application_that_never_starts_its_response_is_an_error(
    serve: Any, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "f", BIG)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        return environ["wsgi.file_wrapper"](path.open("rb"))

    assert b"500 Internal Server Error" in serve(app).ask(request())


def test_over_tls_the_original_sends_it(serve: Any, tmp_path: Path) -> None:
    """An SSL socket is no plain socket; the file arrives all the same."""
    pem = tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    pem.write_bytes((tmp_path / "key").read_bytes() + (tmp_path / "cert").read_bytes())
    path = file_of(tmp_path / "f", BIG)
    server = pywsgi.WSGIServer(
        ("127.0.0.1", 0), file_app(path, ("Content-Length", str(BIG))), log=None, certfile=str(pem)
    )
    server.start()
    with gevent.socket.create_connection(server.address) as sock, counting() as grown:
        context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = gevent.ssl.CERT_NONE
        with context.wrap_socket(sock) as tls:
            tls.sendall(request().encode())
            assert split(receive_all(tls))[2] == path.read_bytes()
    server.stop()
    assert grown.transfers == 0
    assert grown.fallbacks == {"socket_type": 1}


def test_the_wrapper_is_what_pep_3333_asks_for(tmp_path: Path) -> None:
    file = file_of(tmp_path / "f", 20_000).open("rb")
    wrapper = FileWrapper(file)
    assert not hasattr(wrapper, "__len__")
    assert wrapper.seekable()
    assert wrapper.seek(10) == wrapper.tell() == 10
    assert [len(piece) for piece in wrapper] == [8192, 8192, 20_000 - 10 - 2 * 8192]
    wrapper.close()
    assert file.closed
    plain = FileWrapper(iter)
    assert not plain.seekable()
    plain.close()


def test_gunicorns_wrapper_is_recognised(serve: Any, tmp_path: Path) -> None:
    from gunicorn.http.wsgi import FileWrapper as Gunicorns

    path = file_of(tmp_path / "f", BIG)
    server = serve(file_app(path, ("Content-Length", str(BIG))))
    server.server.environ["wsgi.file_wrapper"] = Gunicorns
    with counting() as grown:
        assert split(server.ask(request()))[2] == path.read_bytes()
    assert grown.bytes_spliced == BIG


def test_a_file_behind_a_unix_socket(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", BIG)
    with gevent.socket.socket(gevent.socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "sock"))
        listener.listen()
        server = pywsgi.WSGIServer(listener, file_app(path), log=None)
        server.start()
        with gevent.socket.socket(gevent.socket.AF_UNIX) as sock, counting() as grown:
            sock.connect(os.fspath(tmp_path / "sock"))
            sock.sendall(request().encode())
            assert split(receive_all(sock))[2] == path.read_bytes()
        server.stop()
    assert grown.bytes_spliced == BIG


@pytest.mark.parametrize("kind", ["empty", "proc", "memory"])
def test_head_has_no_body_whatever_is_wrapped(serve: Any, tmp_path: Path, kind: str) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [])
        if kind == "memory":
            return environ["wsgi.file_wrapper"](io.BytesIO(b"body"))
        path = file_of(tmp_path / "f", 0) if kind == "empty" else Path("/proc/self/status")
        return environ["wsgi.file_wrapper"](path.open("rb"))

    with counting() as grown:
        answer = serve(app).ask(request("HEAD", close=False), request("HEAD"))
    assert grown.transfers == 0
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert [part[:4] for part in answer.split(b"\r\n\r\n")] == [b"HTTP", b"HTTP", b""]


def test_after_bytes_written_before_the_connection_is_closed(serve: Any, tmp_path: Path) -> None:
    """Else the client would take what is too much for the next response."""
    path = file_of(tmp_path / "f", BIG)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", str(BIG))])(b"abc")
        return environ["wsgi.file_wrapper"](path.open("rb"))

    with counting() as grown:
        answer = serve(app).ask(request(close=False), request())
    assert (grown.transfers, grown.fallbacks) == (0, {"response": 1})
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert split(answer)[2][:BIG] == (b"abc" + path.read_bytes())[:BIG]


@pytest.mark.parametrize("length", [100, 1_000_000])
def test_an_error_of_the_file_is_not_taken_for_one_of_the_socket(
    serve: Any, length: int, capsys: Any
) -> None:
    noted = []

    class Handler(pywsgi.WSGIHandler):
        def log_request(self) -> None:
            noted.append((self.status, self.close_connection))
            super().log_request()

    # Reading address 0 of a process gives EIO.
    app = file_app(Path("/proc/self/mem"), ("Content-Length", str(length)), buffering=0)
    server = serve(app, Handler)
    small = length == 100
    status, _, body = split(server.ask(request()))
    assert status == ("HTTP/1.1 500 Internal Server Error" if small else "HTTP/1.1 200 OK")
    assert body == (b"Internal Server Error" if small else b"")
    [(logged, closing)] = noted
    assert b"socket error" not in (logged.encode() if isinstance(logged, str) else logged)
    assert closing
    assert "Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_an_error_in_the_middle_of_the_file_is_not_one_of_the_socket_either(
    serve: Any, tmp_path: Path, error: str
) -> None:
    """Whichever error it is."""
    noted = []

    class Handler(pywsgi.WSGIHandler):
        def log_request(self) -> None:
            noted.append(self.status)
            super().log_request()

    with SlowFS(tmp_path) as slow:
        file_of(slow.directory / "f", BIG)
        slow.fail(error, "f", beyond=1024 * 1024)
        server = serve(file_app(slow.mount / "f", ("Content-Length", str(BIG))), Handler)
        _, _, body = split(server.ask(request()))
    assert 0 < len(body) < BIG
    assert some_bytes(BIG).startswith(body)
    assert noted == [b"200 OK"]


def test_a_handler_whose_instance_overrides_the_way_out_sees_every_byte(
    serve: Any, tmp_path: Path
) -> None:
    seen = []

    class Handler(pywsgi.WSGIHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            sendall = self._sendall
            self._sendall = lambda data: (seen.append(bytes(data)), sendall(data))

    path = file_of(tmp_path / "f", BIG)
    with counting() as grown:
        answer = serve(file_app(path), Handler).ask(request())
    assert b"".join(seen) == answer
    assert (grown.transfers, grown.fallbacks) == (0, {"response": 1})


def test_a_small_file_that_is_shorter_than_it_says_has_its_real_length(serve: Any) -> None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert path.stat().st_size > len(path.read_bytes())
    with counting() as grown:
        _, headers, body = split(serve(file_app(path)).ask(request()))
    assert (int(headers["Content-Length"]), body) == (len(body), path.read_bytes())
    assert (grown.bytes_copied, grown.fallbacks) == (len(body), {})


def asked_twice(server: Any, method: str, version: str) -> list[tuple[int, bytes]]:
    """Return the answers that a client gets on one connection that it wants to keep."""
    got = []
    with gevent.Timeout(GUARD), server.connect() as sock:
        for _ in range(2):
            sock.sendall(request(method, close=False, version=version).encode())
            response = http.client.HTTPResponse(sock, method=method)
            response.begin()
            got.append((response.status, response.read()))
            if response.will_close:
                break
            response.close()
        assert not receive_all(sock) if response.will_close else True
    return got


# Of a size that is far too large, the page cache gives whoever reads zeros now and then.
@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("more", "direct"),
    [(more, ["--direct-io"]) for more in (1_000_000, 10, -10, -150_000, -299_999)]
    + [(more, []) for more in (10, -10, -150_000, -299_999)],
)
def test_a_size_that_is_wrong(serve: Any, tmp_path: Path, more: int, direct: list[str]) -> None:
    """As network filesystems may have it: the answer is whole, and the connection goes on."""
    with SlowFS(tmp_path, f"--more={more}", *direct) as slow:

        def new(size: int) -> App:
            path = slow.mount / f"file{len(list(slow.directory.iterdir()))}"
            file_of(slow.directory / path.name, size)
            return file_app(path)

        for size in (300_000, 1000, 10):
            for version, number in (("1.1", 2), ("1.0", 1)):
                ours = asked_twice(serve(new(size)), "GET", version)
                assert ours == asked_twice(serve(unpatched(new(size))), "GET", version)
                assert len(ours) == number
                if direct or more > 0:  # the kernel caches no more than the size
                    assert ours[0] == (200, some_bytes(size))
            assert asked_twice(serve(new(size)), "HEAD", "1.1") == [(200, b"")] * 2


def test_a_wrong_size_is_counted(serve: Any, tmp_path: Path) -> None:
    with SlowFS(tmp_path, "--more=1000", "--direct-io") as slow:
        file_of(slow.directory / "file", 200_000)
        with counting() as grown:
            answer = serve(file_app(slow.mount / "file")).ask(request())
    assert b"Content-Length" not in answer
    assert (grown.transfers, grown.fallbacks) == (0, {"size": 1})


def test_a_wrong_size_makes_no_difference_to_a_part_within_it(serve: Any, tmp_path: Path) -> None:
    for more in (1000, -1000):
        (tmp_path / str(more)).mkdir()
        with SlowFS(tmp_path / str(more), f"--more={more}", "--direct-io") as slow:
            file_of(slow.directory / "file", 200_000)

            def app(environ: dict[str, Any], start_response: Any, slow: Any = slow) -> Any:
                start_response("200 OK", [])
                return FileWrapper(_BoundedFile((slow.mount / "file").open("rb"), 100_000))

            with counting() as grown:
                _, headers, body = split(serve(app).ask(request()))
            assert (headers["Content-Length"], body) == ("100000", some_bytes(200_000)[:100_000])
            assert grown.transfers == 1
            assert "size" not in grown.fallbacks


def test_a_read_that_gives_too_much_is_cut_too(serve: Any) -> None:
    class Generous(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(12)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", "15")])
        return environ["wsgi.file_wrapper"](Generous(b"x" * 36))

    answer = serve(app).ask(request(close=False), request())
    assert (answer.count(b"HTTP/1.1 200 OK"), answer.count(b"x")) == (2, 30)


def test_head_after_a_write_of_nothing_has_no_body(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", 10)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", "10")])(b"")
        return environ["wsgi.file_wrapper"](path.open("rb"))

    assert split(serve(app).ask(request("HEAD")))[2] == b""
