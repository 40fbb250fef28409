"""Servers and frameworks as people run them: the same answers with gsplice, by the fast way."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import file_of
from paths import APPS
from processes import (
    EXCHANGES,
    MIDDLE,
    SIZE,
    WSGI,
    comparable,
    header,
    request,
    sendfile_grown,
    serving,
)
from slowfs import SlowFS

#: For each path the servers on which a whole file, and a range of one, go the fast way.
PYWSGI = {"pywsgi", "gunicorn-gevent_pywsgi"}
EVERY = set(WSGI)
FAST: dict[str, tuple[set[str], set[str]]] = {
    "/plain/": (EVERY, set()),
    "/wsgiref/": (EVERY, set()),
    "/flask/send_file": (EVERY, EVERY),
    "/flask/file.bin": (EVERY, EVERY),
    "/django/file.bin": (EVERY, set()),
    "/django/File": (EVERY, set()),
    "/bottle/file.bin": (EVERY, set()),
    "/whitenoise/file.bin": (EVERY, EVERY),
    "/webob/": (EVERY, EVERY),
    "/falcon/file.bin": (EVERY, EVERY),
    "/pyramid/file.bin": (EVERY, EVERY),
    "/pyramid/FileIter": (EVERY, EVERY),
}
#: These know no ranges.
WHOLE_ONLY = {path for path, (_, part) in FAST.items() if not part} - {"/bottle/file.bin"}
#: These leave it to the server to send no body after HEAD, which pywsgi without us does not do.
HEAD_WITH_BODY = {"/plain/", "/wsgiref/", "/django/file.bin", "/django/File"}


@pytest.mark.few
@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("kind", WSGI)
def test_the_answers_are_the_same(servers: Any, served: Path, kind: str, path: str) -> None:
    content = (served / "file.bin").read_bytes()
    ours, theirs = servers(kind, True), servers(kind, False)
    first = theirs.ask(request(path))
    etag, date = header("ETag", first), header("Last-Modified", first)
    for name, exchange in EXCHANGES.items():
        asked = b"".join(exchange(path, etag, date))
        answer = theirs.ask(asked)
        if name.startswith("HEAD") and kind in PYWSGI and path in HEAD_WITH_BODY:
            answer = answer.replace(content, b"", 1)
        assert comparable(ours.ask(asked)) == comparable(answer), name
    assert ours.seen()["open_files"] == theirs.seen()["open_files"] == 0
    assert theirs.seen()["transfers"] == 0


@pytest.mark.few
@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("kind", WSGI)
def test_the_fast_way(servers: Any, served: Path, kind: str, path: str) -> None:
    content = (served / "file.bin").read_bytes()
    server = servers(kind, True)
    whole, part = FAST[path]
    answer, sent = sendfile_grown(server, request(path))
    assert answer.partition(b"\r\n\r\n")[2] == content
    assert sent == (SIZE if kind in whole else 0)
    if path not in WHOLE_ONLY:
        answer, sent = sendfile_grown(server, request(path, MIDDLE))
        assert b" 206 " in answer.partition(b"\r\n")[0]
        assert answer.partition(b"\r\n\r\n")[2] == content[200_001:700_001]
        assert sent == (500_000 if kind in part else 0)


@pytest.mark.thorough
@pytest.mark.parametrize("more", [100_000, -100_000])
@pytest.mark.parametrize("kind", WSGI)
def test_a_size_that_is_wrong(tmp_path: Path, kind: str, more: int) -> None:
    """As long as nobody declares it. gunicorn does, in the head of its only chunk."""
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(SlowFS(tmp_path, f"--more={more}", "--direct-io"))
        file_of(slow.directory / "file.bin", SIZE)
        ours, theirs = (
            stack.enter_context(serving(kind, slow.mount, patched)) for patched in (True, False)
        )
        get = "/undeclared/"
        twice = request(get, close=False) + request(get)
        answer = ours.ask(twice)
        assert comparable(answer) == comparable(theirs.ask(twice))
        if kind in PYWSGI:
            assert len(comparable(answer)[0]) == 2
            assert answer.endswith(b"\r\n0\r\n\r\n")
        for path, version in ((get, "1.0"), *((path, "1.1") for path in FAST)):
            asked = request(path, version=version)
            if path == get or more > 0:  # what is more than was declared, we don't send
                assert comparable(ours.ask(asked)) == comparable(theirs.ask(asked)), path


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", WSGI)
def test_a_client_that_goes_away(servers: Any, served: Path, kind: str) -> None:
    """The file is closed, and others are answered."""
    content = (served / "file.bin").read_bytes()
    server = servers(kind, True)
    for path in FAST:
        for headers in ([], [MIDDLE]):
            with server.connect() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0] + [0] * 4))
                sock.sendall(request(path, *headers))
                sock.recv(1)
    while server.seen()["open_files"]:
        pass
    assert server.ask(request("/plain/")).endswith(content)


@pytest.mark.few(1)
@pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
def test_gunicorn_with_an_application_loaded_before_the_fork(served: Path, worker: str) -> None:
    """Which worker answers is left to chance, but it is the same one for all of a connection."""
    content = (served / "file.bin").read_bytes()
    with serving(f"gunicorn-{worker} --preload --workers 2", served, True) as server:
        for _ in range(4):
            answer = server.ask(request("/plain/", close=False) + request("/stats"))
            assert content in answer
            assert json.loads(answer[answer.rindex(b'{"pipes') :])["bytes_spliced"] >= SIZE


def test_hooks_of_gunicorn_see_the_application(served: Path, tmp_path: Path) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text(
        (APPS / "gunicorn.conf.py").read_text()
        + f"""
def post_request(worker, req, environ, resp):
    open({str(tmp_path / "seen")!r}, "a").write(worker.wsgi.__name__)
"""
    )
    with serving(f"gunicorn-gevent -c {conf}", served, True) as server:
        assert sendfile_grown(server, request("/flask/send_file", MIDDLE))[1] == 500_000
    assert (tmp_path / "seen").read_text().startswith("app")


def test_gunicorn_told_not_to_use_sendfile(served: Path) -> None:
    content = (served / "file.bin").read_bytes()
    with serving("gunicorn-gevent --no-sendfile", served, True) as server:
        answer, sent = sendfile_grown(server, request("/flask/send_file", MIDDLE))
        assert answer.partition(b"\r\n\r\n")[2] == content[200_001:700_001]
        assert sent == 0


def test_gunicorn_logs_what_was_sent(served: Path, tmp_path: Path) -> None:
    logs = []
    for patched in (True, False):
        log = tmp_path / str(patched)
        options = f"--access-logformat %(U)s:%(s)s:%(B)s --access-logfile {log}"
        with serving(f"gunicorn-gevent {options}", served, patched) as server:
            for path in ("/flask/send_file", "/whitenoise/file.bin", "/pyramid/FileIter"):
                server.ask(request(path, MIDDLE))
            server.ask(request("/stats"))
        logs.append(log.read_text().splitlines())
    assert logs[0][:-1] == logs[1][:-1]
    assert logs[0][0] == "/send_file:206:500000"


def test_gunicorn_keeps_the_connection_after_half_of_a_file_open_for_writing(
    servers: Any, served: Path
) -> None:
    """Unpatched, closing the file fails, and gunicorn closes the connection."""
    asked = request("/writable/", close=False) + request("/writable/")
    half = (served / "file.bin").read_bytes()[: SIZE // 2]
    ours, sent = sendfile_grown(servers("gunicorn-gevent", True), asked)
    theirs = servers("gunicorn-gevent", False).ask(request("/writable/", close=False))
    for answer, times in ((ours, 2), (theirs, 1)):
        assert answer.count(b"HTTP/1.1 200 OK") == answer.count(half) == times
    assert sent == 2 * len(half)


@pytest.mark.parametrize("exchange", ["whole", "If-Modified-Since", "HEAD", "HTTP/1.0"])
def test_http_server(servers: Any, served: Path, exchange: str) -> None:
    ours, theirs = servers("http.server", True), servers("http.server", False)
    date = header("Last-Modified", theirs.ask(request("/file.bin")))
    asked = b"".join(EXCHANGES[exchange]("/file.bin", "", date))
    answer, sent = sendfile_grown(ours, asked)
    assert comparable(answer) == comparable(theirs.ask(asked))
    assert sent == (SIZE if exchange in ("whole", "HTTP/1.0") else 0)
    assert ours.seen()["open_files"] == theirs.seen()["transfers"] == 0


def test_http_server_keeps_the_connection(servers: Any) -> None:
    get = request("/file.bin", close=False)
    asked = get + request("/file.bin", method="HEAD", close=False) + get + request("/missing")
    answers = [servers("http.server", patched).ask(asked) for patched in (True, False)]
    assert comparable(answers[0]) == comparable(answers[1])
    assert len(comparable(answers[0])[0]) == 4


@pytest.mark.parametrize("way", ["copyfileobj", "sendfile"])
def test_socketserver(servers: Any, served: Path, way: str) -> None:
    content = (served / "file.bin").read_bytes()
    server = servers("socketserver", True)
    before = json.loads(server.ask(b"stats\n"))
    assert server.ask(f"{way}\n".encode()) == content
    after = json.loads(server.ask(b"stats\n"))
    assert after["bytes_spliced"] - before["bytes_spliced"] == SIZE
    assert servers("socketserver", False).ask(f"{way}\n".encode()) == content
