"""Uploads of geventhttpclient, the client of locust's FastHttpUser, go out by sendfile."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.server
import pytest
from conftest import counting, digest, file_of, some_bytes
from ends import GUARD, MiB
from geventhttpclient import HTTPClient
from geventhttpclient.useragent import UserAgent
from unpatched import unpatched

SIZE = 2 * MiB + 7
SMALL = 5000


@pytest.fixture
def uploads() -> Iterator[Any]:
    """A server that keeps each request as it has arrived, ``.requests``, and says that it did."""

    def handle(sock: Any, address: Any) -> None:
        # What cannot be understood ends the connection, and the client says so.
        with sock.makefile("rb") as file:
            head = b""
            while line := file.readline():
                head += line
                if line == b"\r\n":
                    if b"100-continue" in head:
                        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    length = re.search(rb"\nContent-Length: ([0-9]+)\r\n", head, re.IGNORECASE)
                    server.requests.append((head, digest(file.read(int(length[1])))))
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngot\n")
                    head = b""

    server = gevent.server.StreamServer(("127.0.0.1", 0), handle)
    server.requests = []
    server.start()
    with gevent.Timeout(GUARD):
        yield server
    server.stop()


def post(server: Any, body: Any, headers: dict[str, str]) -> bytes:
    with contextlib.closing(HTTPClient("127.0.0.1", server.server_port)) as client:
        # The second must find the first one's end, so it is on the same connection.
        answers = [client.post("/up", body, headers).read(), client.post("/", b"end").read()]
    return b"".join(answers)


def urlopen(server: Any, body: Any, headers: dict[str, str]) -> bytes:
    with contextlib.closing(UserAgent()) as agent:
        url = f"http://127.0.0.1:{server.server_port}/up"
        return agent.urlopen(url, method="POST", payload=body, headers=headers).content


@pytest.mark.few
@pytest.mark.parametrize("upload", [post, urlopen])
@pytest.mark.parametrize("more", [{}, {"Expect": "100-continue"}], ids=["", "Expect"])
@pytest.mark.parametrize(
    ("size", "position"),
    [(SIZE, 0), (SIZE, 1), (SIZE, 700_001), (SIZE, SIZE - 3), (SMALL, 0), (SMALL, 1000)],
)
def test_a_file_is_uploaded_from_where_it_stands(
    tmp_path: Path, uploads: Any, upload: Any, size: int, position: int, more: dict[str, str]
) -> None:
    path = file_of(tmp_path / "body", size)
    headers = {"Content-Length": str(size - position), **more}

    def run() -> tuple[bytes, list[Any], int]:
        uploads.requests.clear()
        with path.open("rb") as body:
            body.seek(position)
            answer = upload(uploads, body, headers)
            return answer, list(uploads.requests), body.tell()

    with unpatched(), counting() as grown:
        wanted = run()
    assert grown.transfers == 0
    with counting() as grown:
        answer, requests, stands = run()
    assert (answer, requests) == wanted[:2]
    assert requests[0][1] == digest(path.read_bytes()[position:])
    assert stands == size  # gevent's own seeks to the number of bytes sent
    way = grown.bytes_spliced if size - position > SMALL else grown.bytes_copied
    assert way == size - position
    assert grown.fallbacks == {}


@pytest.mark.parametrize("size", [SMALL, SIZE])
def test_crlf_after_a_body_is_left_to_its_parser(tmp_path: Path, size: int) -> None:
    """Its responses read in a way of their own: they go to the original."""
    body = some_bytes(size)

    def handle(sock: Any, address: Any) -> None:
        with sock.makefile("rb") as file:
            while line := file.readline():
                if line == b"\r\n":
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()
                    sock.sendall(head + body + b"\r\n")

    server = gevent.server.StreamServer(("127.0.0.1", 0), handle)
    server.start()

    def run() -> list[bytes]:
        with contextlib.closing(HTTPClient("127.0.0.1", server.server_port)) as client:
            for number in "01":
                with open(tmp_path / number, "wb") as file:
                    shutil.copyfileobj(client.get("/"), file)
        return [(tmp_path / number).read_bytes() for number in "01"]

    with gevent.Timeout(GUARD):
        with unpatched():
            assert run() == [body, body]
        with counting() as grown:
            assert run() == [body, body]
    server.stop()
    assert grown.fallbacks == {"source_type": 2}
