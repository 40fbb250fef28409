"""The example file server in a process of its own, what it serves, and a client."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from paths import PROJECT

SCRIPT = PROJECT / "examples" / "file_server.py"
SECRET = b"not for everybody"
BIG = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(100_000))  # 3.2 MB
TEXT = b"0123456789" * 10
HOSTILE = '"quoted" <script>alert(1)<b> it\'s #1 & 100%41?.txt'
NOT_UTF8 = b"latin\xe9.txt"
TIMEOUT = 20


@dataclasses.dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


@dataclasses.dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    lines: list[str]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask for ``path``; ``If_Range="x"`` becomes the header ``If-Range: x``."""
        with contextlib.closing(self.connect()) as connection:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return ask(connection, path, method, sent)

    def raw(self, request: bytes) -> Answer:
        """Send bytes as they are: no client tidies the path up."""
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as sock:
            sock.sendall(request)
            return answer_of(http.client.HTTPResponse(sock))

    def raw_get(self, target: bytes) -> Answer:
        return self.raw(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    def stats(self) -> dict[str, Any]:
        return json.loads(self.get("/.stats.json").body)

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, errors


def ask(
    connection: http.client.HTTPConnection, path: str, method: str, headers: dict[str, str]
) -> Answer:
    connection.request(method, path, headers=headers)
    return answer_of(connection.getresponse(), begun=True)


def answer_of(response: http.client.HTTPResponse, begun: bool = False) -> Answer:
    if not begun:
        response.begin()
    with response:
        return Answer(response.status, response.headers, response.read())


@contextlib.contextmanager
def serving(root: Path, *options: str, prefix: tuple[str, ...] = ()) -> Iterator[Server]:
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        [*prefix, sys.executable, str(SCRIPT), "--port", "0", *options, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", lines[0])
        assert address, (lines, process.communicate(timeout=TIMEOUT))
        yield Server(process, int(address[1]), lines)
    finally:
        if process.poll() is None:
            process.kill()
        with process:
            pass


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    (base / "secret.txt").write_bytes(SECRET)
    (base / "root-too").mkdir()
    (base / "root-too" / "secret.txt").write_bytes(SECRET)
    root = base / "root"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "sub" / "inner.txt").write_bytes(b"inner")
    (root / "big.bin").write_bytes(BIG)
    (root / "text.txt").write_bytes(TEXT)
    (root / "Empty.dat").write_bytes(b"")
    (root / ".hidden").write_bytes(b"hidden")
    (root / "page.html").write_bytes(b"<p>page")
    (root / "archive.tar.gz").write_bytes(b"\x1f\x8bnot unpacked")
    (root / "unknown.qqq").write_bytes(b"?")
    (root / "data:,x.html").write_bytes(b"colon")
    (root / HOSTILE).write_bytes(b"hostile")
    Path(os.fsdecode(os.path.join(os.fsencode(root), NOT_UTF8))).write_bytes(b"latin")
    (root / "inside-link").symlink_to("sub/inner.txt")
    (root / "inside-directory").symlink_to("sub")
    (root / "absolute-inside-link").symlink_to(root / "text.txt")
    (root / "outside-link").symlink_to(base / "secret.txt")
    (root / "relative-outside-link").symlink_to("../secret.txt")
    (root / "sibling-link").symlink_to("../root-too")
    (root / "outside-directory").symlink_to("/")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "device-link").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    (root / "fifo-link").symlink_to("fifo")
    descriptor = os.open(root, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        # The path as it is may be longer than a socket's address can be.
        listener.bind(f"/proc/self/fd/{descriptor}/socket")
    os.close(descriptor)
    (root / r"\evil.example").mkdir()
    for seconds, name in enumerate(["page.html", "text.txt", "unknown.qqq"], 1_500_000_000):
        os.utime(root / name, (seconds, seconds))
    return root


#: Root may read everything; without these two capabilities it may what its files' modes say.
ORDINARY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


@pytest.fixture(scope="session", params=["patched", "plain"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Server]:
    """A server in each of the two ways: whatever is not about counters holds for both."""
    with serving(root, *(["--no-patch"] if request.param == "plain" else [])) as server:
        yield server
        code, errors = server.stop()
    assert (code, errors) == (0, "")


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A directory with a file of more than any socket's buffers hold."""
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 30)
    return tmp_path


def open_files(root: Path, descriptors: str = "/proc/self/fd") -> list[str]:
    links = []
    for descriptor in os.listdir(descriptors):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"{descriptors}/{descriptor}"))
    return [link for link in links if link.startswith(str(root))]


class Listing(HTMLParser):
    """What a browser would make of a listing: its links in order, headings, scripts."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        self.links: list[tuple[str, str]] = []
        self.rows: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.sizes: dict[str, str] = {}
        self.times: dict[str, str] = {}
        self.aria: dict[str, str | None] = {}
        self.inside = ""
        self.heading: str | None = None
        self.feed(answer.body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag in ("thead", "tbody", "footer", "nav"):
            self.inside = tag
        if tag == "th":
            self.heading = attributes.get("aria-sort") or ""
        if tag == "a":
            self.links.append((attributes["href"] or "", ""))
        if tag == "td" and "title" in attributes:
            self.sizes[self.links[-1][1]] = attributes["title"] or ""
        if tag == "time":
            self.times[self.links[-1][1]] = attributes["datetime"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self.inside == "tbody":
            self.rows.append(self.links[-1])
        if tag == "a" and self.inside == "thead":
            self.aria[self.links[-1][1]] = self.heading

    def handle_data(self, data: str) -> None:
        if self.links and self.lasttag == "a":
            href, text = self.links[-1]
            if data.strip() or text == "":
                self.links[-1] = (href, text + data)

    @property
    def names(self) -> list[str]:
        return [text for _, text in self.rows]
