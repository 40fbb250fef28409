"""The example proxy for HTTP's CONNECT, with real clients."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import receive_all
from ends import GUARD
from proxies import (
    DATA,
    MUCH,
    Proxy,
    accept,
    command,
    down_and_up,
    echo_by_tls,
    echo_messages,
    echoing,
    environment,
    exchange,
    http_server,
    listening,
    make_certificate,
    nobody,
    running,
    server_context,
    shown,
    silence,
    websocket_echo,
)

PROGRAM = "http_connect_proxy.py"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def proxying(
    *ports: int, arguments: tuple[str, ...] = ()
) -> contextlib.AbstractContextManager[Proxy]:
    return running(PROGRAM, *arguments, "--allow-port", *map(str, ports or (443,)))


def connect_request(address: Any) -> bytes:
    return f"CONNECT {shown(address)} HTTP/1.1\r\nHost: {shown(address)}\r\n\r\n".encode()


def answer_to(proxy: Proxy, request: bytes) -> tuple[int, dict[str, str], str]:
    """Send a request that is sent away; return the status, the headers, and the reason."""
    with proxy.connect() as client:
        client.sendall(request)
        head, _, body = receive_all(client).decode().partition("\r\n\r\n")
    line, *headers = head.split("\r\n")
    match = re.fullmatch(r"HTTP/1\.1 (\d+) .+", line)
    assert match, line
    fields = dict(header.split(": ") for header in headers)
    assert int(fields["Content-Length"]) == len(body.encode())
    assert fields["Connection"] == "close"
    return int(match[1]), fields, body


def test_curl_through_it(tmp_path: Path) -> None:
    """A download and an upload of a server that is verified, by a client that knows proxies."""
    certificate = make_certificate(tmp_path)
    with http_server(server_context(certificate)) as server, proxying(server[1]) as proxy:
        url = f"https://localhost:{server[1]}/"
        options = ["--proxy", proxy.url, "--cacert", certificate]
        both = down_and_up(proxy, tmp_path, *options, url)
    assert both["answers"] == {"200": 2}
    assert both["tunnels"]["bytes_to_client"] > len(DATA)
    assert both["tunnels"]["bytes_to_backend"] > len(DATA)


def test_tls_through_it(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with echoing(server_context(certificate)) as server, proxying(server[1]) as proxy:
        with proxy.connect() as plain:
            plain.sendall(connect_request(server))
            assert plain.recv(len(ESTABLISHED)) == ESTABLISHED
            echo_by_tls(plain, certificate)
        counts = proxy.idle()
    assert counts["gsplice"]["bytes_spliced"] > MUCH
    assert counts["tunnels"]["broken"] == 0


def test_websocket_through_it() -> None:
    from websockets.sync.client import connect

    with websocket_echo() as server, proxying(server[1]) as proxy:
        with connect(f"ws://{shown(server)}", max_size=None, proxy=proxy.url) as websocket:
            echo_messages(websocket)
        assert websocket.close_code == 1000
        counts = proxy.idle()
    assert counts["gsplice"]["bytes_spliced"] > 0
    assert counts["tunnels"]["total"] == 1


def test_what_comes_behind_the_request_goes_first() -> None:
    """A client need not wait for the answer."""
    with listening() as backend, proxying(backend.getsockname()[1]) as proxy:
        with proxy.connect() as client:
            client.sendall(connect_request(backend.getsockname()) + b"at once, ")
            with accept(backend) as server:
                assert server.recv(9, socket.MSG_WAITALL) == b"at once, "
                client.sendall(b"and later")
                client.shutdown(socket.SHUT_WR)
                assert receive_all(server) == b"and later"
                server.sendall(b"answer")
            assert receive_all(client) == ESTABLISHED + b"answer"
        assert proxy.idle()["tunnels"]["bytes_to_backend"] == 18


def test_request_in_pieces() -> None:
    with echoing() as server, proxying(server[1]) as proxy, proxy.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in connect_request(server):
            client.sendall(bytes([byte]))
        assert client.recv(len(ESTABLISHED), socket.MSG_WAITALL) == ESTABLISHED
        assert exchange(client, b"x") == b"x"


@pytest.fixture(scope="module")
def proxy() -> Any:
    with proxying(arguments=("--header-timeout", "0.3")) as proxy:
        yield proxy


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (b"\r\n\r\n", 400, "no request"),
        (b"\x16\x03\x01\x02\0\r\n\r\n", 400, "no request"),
        (b"CONNECT a:443\r\n\r\n", 400, "no request"),
        (b"CONNECT  a:443 HTTP/1.1\r\n\r\n", 400, "no request"),
        (b"CONNECT a:443 HTTP/2.0\r\n\r\n", 400, "no request"),
        (b"CONNECT a HTTP/1.1\r\n\r\n", 400, "'a' is not HOST:PORT"),
        (b"CONNECT :443 HTTP/1.1\r\n\r\n", 400, "':443' is not HOST:PORT"),
        (b"CONNECT http://a:443/ HTTP/1.1\r\n\r\n", 400, "is not HOST:PORT"),
        (b"CONNECT ::1:443 HTTP/1.1\r\n\r\n", 400, "is not HOST:PORT"),
        (b"CONNECT a:65536 HTTP/1.1\r\n\r\n", 400, "is not HOST:PORT"),
        (b"CONNECT a..b:443 HTTP/1.1\r\n\r\n", 400, "no name of a host"),
        (b"CONNECT localhost:25 HTTP/1.1\r\n\r\n", 403, "Port 25 is not allowed."),
        (b"CONNECT a:443 HTTP/1.1\r\n", 408, "No request came."),
        (b"", 408, "No request came."),
        (b"CONNECT a:443 HTTP/1.1\r\nx: " + b"x" * 20_000, 431, "too long"),
        (b"CONNECT name.invalid:443 HTTP/1.0\r\n\r\n", 502, "Errno"),
    ],
)
def test_sent_away(proxy: Proxy, request_: bytes, status: int, reason: str) -> None:
    before = proxy.idle()["answers"]
    got, _, text = answer_to(proxy, request_)
    assert got == status, text
    assert reason in text
    after = proxy.idle()["answers"]
    assert after[str(status)] == before.get(str(status), 0) + 1


def test_only_connect(proxy: Proxy) -> None:
    """The answer gets to a client that is still sending, more than the sockets can hold."""
    request = f"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: {len(DATA)}\r\n\r\n"
    status, headers, _ = answer_to(proxy, request.encode() + DATA)
    assert status == 405
    assert headers["Allow"] == "CONNECT"


def test_client_that_leaves(proxy: Proxy) -> None:
    before = proxy.idle()
    with proxy.connect() as client:
        client.sendall(b"CONNECT a")
    with proxy.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    total = before["clients"]["total"] + 2
    proxy.until(lambda counts: counts["clients"]["total"] == total)
    after = proxy.idle()["answers"]
    assert after == {**before["answers"], "405": before["answers"].get("405", 0) + 1}


def test_nobody_there() -> None:
    with nobody() as address, proxying(address[1]) as proxy:
        status, _, text = answer_to(proxy, connect_request(address))
        assert (status, "refused" in text) == (502, True)
        assert proxy.idle()["tunnels"]["failed"] == 1


def test_no_answer() -> None:
    arguments = ("--connect-timeout", "0.2")
    with silence() as address, proxying(address[1], arguments=arguments) as proxy:
        status, _, text = answer_to(proxy, connect_request(address))
        assert (status, text) == (504, "no connection within 0.2 seconds\n")


def test_it_is_for_this_machine_and_port_443_unless_told_otherwise() -> None:
    done = subprocess.run(
        command(PROGRAM, "--help"), env=environment(), capture_output=True, text=True, timeout=GUARD
    )
    text = " ".join(done.stdout.split())
    assert "any free one; default: 127.0.0.1:3128" in text
    assert "that tunnels may lead to; default: 443" in text
