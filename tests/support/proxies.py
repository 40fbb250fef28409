"""The example proxies as processes of their own, and who is on either side of them."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import select
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import ended_with, some_bytes
from ends import GUARD, MiB
from paths import PROJECT

DATA = some_bytes(16 * MiB)

Address = tuple[str, int]

#: Nearly all is spliced, unless the sender is so slow that its bytes come as small messages.
MUCH = MiB


class Proxy:
    """A running proxy, spoken to by clients of this process, whose sockets are not gevent's."""

    def __init__(self, process: subprocess.Popen[str], options: tuple[str, ...]) -> None:
        self.process = process
        self.errors = ""
        line = self.line()
        match = re.fullmatch(r"Listening on (?:\[(.+)\]|(.+)):(\d+) \(Ctrl-C to stop\)\n", line)
        assert match, (line, process.communicate(timeout=GUARD))
        self.address: Address = (match[1] or match[2], int(match[3]))
        self.workers = int(options[options.index("--workers") + 1]) if "--workers" in options else 1

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    @property
    def url(self) -> str:
        return f"http://{shown(self.address)}"

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, GUARD)

    def all_counts(self) -> list[dict[str, Any]]:
        """Ask for the counters, of each worker."""
        self.process.send_signal(signal.SIGUSR1)
        return [json.loads(self.line()) for _ in range(self.workers)]

    def counts(self) -> dict[str, Any]:
        (counts,) = self.all_counts()
        return counts

    def idle(self) -> dict[str, Any]:
        """Wait until no connection is left; return the counters."""
        return self.until(lambda counts: not counts["clients"]["open"])

    def until(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        deadline = time.monotonic() + GUARD
        while not condition(counts := self.counts()):
            assert time.monotonic() < deadline, counts
            time.sleep(0.01)
        return counts

    def until_refused(self) -> None:
        """Wait until nobody listens any more; leave nothing under way."""
        deadline = time.monotonic() + GUARD
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with self.connect() as sock:
                    reset_on_close(sock)
                time.sleep(0.01)
            raise AssertionError("it still listens")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; it has to end well."""
        self.process.send_signal(number)
        self.ended()

    def ended(self) -> None:
        _, self.errors = self.process.communicate(timeout=GUARD)
        assert self.process.returncode == 0, self.errors


def command(program: str, *options: str) -> list[str]:
    return [sys.executable, str(PROJECT / "examples" / program), *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path}


@contextlib.contextmanager
def running(
    program: str, *options: str, listen: str = "127.0.0.1:0", errors: str = ""
) -> Iterator[Proxy]:
    """Run a proxy; at the end it ends well, having said nothing but *errors* (a pattern)."""
    options = ("--listen", listen, *options)
    with ended_with(
        command(program, *options),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        proxy = Proxy(process, options)
        yield proxy
        if process.returncode is None:
            proxy.stop()
        assert re.fullmatch(errors, proxy.errors), proxy.errors


def shown(address: Address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", backlog: int = 10) -> Iterator[socket.socket]:
    """Listen; accept() and what it gives do not wait for ever."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=backlog) as listener:
        listener.settimeout(GUARD)
        yield listener


def reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(GUARD)
    return sock


@contextlib.contextmanager
def nobody() -> Iterator[Address]:
    """An address that refuses connections: bound, so that it is nobody else's."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()


@contextlib.contextmanager
def silence() -> Iterator[Address]:
    """An address that answers no one: Linux drops what comes to a full queue."""
    with listening(backlog=0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, GUARD):
            yield address


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[Address]:
    """Have *server* serve in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    with server:
        thread.start()
        try:
            yield server.server_address  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def echoing(context: ssl.SSLContext | None = None) -> Iterator[Address]:
    """Send back what comes, until it ends, over TLS if there is a context."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            sock = self.request
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True)
            while data := sock.recv(1 << 16):
                sock.sendall(data)
            if context is not None:
                sock.unwrap().close()

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    with serving(server) as address:
        yield address


@contextlib.contextmanager
def http_server(context: ssl.SSLContext | None = None) -> Iterator[Address]:
    """Give DATA to who asks, and the digest of what is uploaded to who uploads."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(DATA)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(sha256(body).encode())

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server) as address:
        yield address


def curl(*arguments: object) -> bytes:
    command = ["curl", "--silent", "--show-error", "--noproxy", "", "--max-time", GUARD, *arguments]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_certificate(directory: Path) -> Path:
    """Make a certificate for localhost, and its key, in one file."""
    key, path = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", path]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send *data*, and meanwhile receive as much; in one thread, as an SSLSocket is not for two."""
    blocked = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    received = bytearray()
    left = memoryview(data)
    sock.setblocking(False)
    while len(received) < len(data):
        before = len(received), len(left)
        if left:
            with contextlib.suppress(*blocked):
                left = left[sock.send(left[: 1 << 16]) :]
        with contextlib.suppress(*blocked):
            piece = sock.recv(1 << 16)
            assert piece, f"only {len(received)} of {len(data)} bytes came back"
            received += piece
        if (len(received), len(left)) == before:
            ready = select.select([sock], [sock] if left else [], [], GUARD)
            assert any(ready), f"only {len(received)} of {len(data)} bytes came back in time"
    sock.settimeout(GUARD)
    return bytes(received)


@contextlib.contextmanager
def websocket_echo() -> Iterator[Address]:
    from websockets.sync.server import ServerConnection, serve

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, "127.0.0.1", 0, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()
        server.shutdown()
        thread.join()


def down_and_up(proxy: Proxy, directory: Path, *options: Any) -> Any:
    """Have curl download DATA and upload it; return what the proxy has counted then."""
    upload = directory / "upload"
    upload.write_bytes(DATA)
    assert sha256(curl(*options)) == sha256(DATA)
    down = proxy.idle()
    assert curl("--upload-file", upload, *options) == sha256(DATA).encode()
    both = proxy.idle()
    assert down["gsplice"]["bytes_spliced"] > MUCH
    assert both["gsplice"]["bytes_spliced"] - down["gsplice"]["bytes_spliced"] > MUCH
    return both


def echo_by_tls(plain: socket.socket, certificate: Path) -> None:
    """Send DATA over TLS to somebody who sends it back, and end; *plain* is closed."""
    context = ssl.create_default_context(cafile=certificate)
    with context.wrap_socket(plain, server_hostname="localhost") as sock:
        assert sha256(exchange(sock, DATA)) == sha256(DATA)
        sock.unwrap().close()  # both ends have said that they have ended


def echo_messages(websocket: Any) -> None:
    for message in ("small", DATA[: 4 * MiB], "", b"\0"):
        websocket.send(message)
        assert websocket.recv(GUARD) == message
