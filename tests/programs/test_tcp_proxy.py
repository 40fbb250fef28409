"""The example TCP proxy, with real clients and servers on its two sides."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import receive_all
from ends import GUARD, MiB
from proxies import (
    DATA,
    MUCH,
    Address,
    Proxy,
    accept,
    command,
    curl,
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
    reset_on_close,
    running,
    server_context,
    sha256,
    shown,
    silence,
    websocket_echo,
)

PROGRAM = "tcp_proxy.py"


def proxying(*backends: Address, **options: Any) -> contextlib.AbstractContextManager[Proxy]:
    arguments = options.pop("arguments", ())
    to = [word for backend in backends for word in ("--to", shown(backend))]
    return running(PROGRAM, *to, *arguments, **options)


def is_refused(proxy: Proxy) -> bool:
    """Say whether a new connection is reset, maybe while the client still waits for it."""
    try:
        with proxy.connect() as client:
            return is_reset(client)
    except ConnectionResetError:
        return True


def is_reset(sock: socket.socket) -> bool:
    """Say whether the connection is reset, not ended."""
    try:
        sock.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_curl_through_it(tmp_path: Path) -> None:
    with http_server() as backend, proxying(backend) as proxy:
        both = down_and_up(proxy, tmp_path, proxy.url)
    counts = both["backends"][shown(backend)]
    assert counts["bytes_to_client"] > len(DATA)
    assert counts["bytes_to_backend"] > len(DATA)
    assert (counts["total"], counts["broken"], counts["failed"]) == (2, 0, 0)


def test_tls_through_it(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with echoing(server_context(certificate)) as backend, proxying(backend) as proxy:
        echo_by_tls(proxy.connect(), certificate)
        counts = proxy.idle()
    assert counts["gsplice"]["bytes_spliced"] > MUCH
    assert counts["backends"][shown(backend)]["broken"] == 0


def test_websocket_through_it() -> None:
    from websockets.sync.client import connect

    with websocket_echo() as backend, proxying(backend) as proxy:
        with connect(f"ws://{shown(proxy.address)}", max_size=None, proxy=None) as websocket:
            echo_messages(websocket)
            assert websocket.ping().wait(GUARD)
        assert websocket.close_code == 1000
        counts = proxy.idle()
    assert counts["gsplice"]["bytes_spliced"] > 0
    assert counts["backends"][shown(backend)]["broken"] == 0


def test_half_close_is_passed_on() -> None:
    """As with ``nc -N``: the answer comes after the end of the question."""
    with listening() as backend, proxying(backend.getsockname()) as proxy:
        with proxy.connect() as client, accept(backend) as server:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(server) == b"question"
            server.sendall(b"answer")
            server.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"answer"
        counts = proxy.idle()["backends"][shown(backend.getsockname())]
        assert (counts["bytes_to_backend"], counts["bytes_to_client"]) == (8, 6)
        assert (counts["total"], counts["broken"]) == (1, 0)


def test_backends_take_turns() -> None:
    with echoing() as one, echoing() as other, proxying(one, other) as proxy:
        for _ in range(4):
            with proxy.connect() as client:
                assert exchange(client, b"x") == b"x"
        backends = proxy.idle()["backends"]
    assert [backends[shown(backend)]["total"] for backend in (one, other)] == [2, 2]


def test_backend_that_is_down() -> None:
    """The next one is tried; that it is down, and is up again, is said once."""
    with contextlib.ExitStack() as stack:
        down = stack.enter_context(socket.socket())
        down.bind(("127.0.0.1", 0))
        down.settimeout(GUARD)
        name = shown(down.getsockname())
        up = stack.enter_context(echoing())
        errors = (
            f"Backend {name} can't be reached: .*refused\nBackend {name} can be reached again\n"
        )
        proxy = stack.enter_context(proxying(down.getsockname(), up, errors=errors))
        for _ in range(4):
            with proxy.connect() as client:
                assert exchange(client, b"x") == b"x"
        backends = proxy.idle()["backends"]
        assert (backends[name]["failed"], backends[name]["total"]) == (2, 0)
        assert backends[shown(up)]["total"] == 4
        down.listen()
        with proxy.connect(), accept(down) as server:
            server.close()
        assert proxy.idle()["backends"][name]["total"] == 1


def test_all_backends_down() -> None:
    with nobody() as one, nobody() as other:
        errors = "(Backend .* can't be reached: .*refused\n){2}"
        with proxying(one, other, errors=errors) as proxy:
            for _ in range(2):
                assert is_refused(proxy)
            counts = proxy.idle()
    assert counts["clients"] == {"open": 0, "total": 2, "refused": 0}
    assert [backend["failed"] for backend in counts["backends"].values()] == [2, 2]


def test_backend_that_does_not_answer() -> None:
    with silence() as silent, echoing() as up:
        arguments = ("--connect-timeout", "0.2")
        errors = ".* can't be reached: no connection within 0.2 seconds\n"
        with proxying(silent, up, arguments=arguments, errors=errors) as proxy:
            with proxy.connect() as client:
                assert exchange(client, b"x") == b"x"
            assert proxy.idle()["backends"][shown(silent)]["failed"] == 1


def test_connection_limit() -> None:
    with echoing() as backend, proxying(backend, arguments=("--max-connections", "1")) as proxy:
        with proxy.connect() as first:
            assert exchange(first, b"x") == b"x"
            assert is_refused(proxy)
            assert exchange(first, b"y") == b"y"
            assert proxy.counts()["clients"] == {"open": 1, "total": 2, "refused": 1}
        proxy.idle()
        with proxy.connect() as another:
            assert exchange(another, b"z") == b"z"


def test_idle_timeout() -> None:
    with (
        listening() as backend,
        proxying(backend.getsockname(), arguments=("--idle-timeout", "0.2")) as proxy,
    ):
        with proxy.connect() as client, accept(backend) as server:
            client.sendall(b"x")
            assert server.recv(10) == b"x"
            assert is_reset(client)
            assert is_reset(server)
        counts = proxy.idle()["backends"][shown(backend.getsockname())]
        assert (counts["broken"], counts["bytes_to_backend"]) == (1, 1)


def test_reset_is_passed_on() -> None:
    """Half a download must not look like a whole one."""
    with listening() as backend, proxying(backend.getsockname()) as proxy:
        with proxy.connect() as client, accept(backend) as server:
            server.sendall(b"half")
            assert client.recv(10) == b"half"
            reset_on_close(server)
            server.close()
            assert is_reset(client)
        assert proxy.idle()["backends"][shown(backend.getsockname())]["broken"] == 1


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("listen", "host", "version"),
    [
        ("127.0.0.1:0", "127.0.0.1", "TCP4"),
        ("[::1]:0", "::1", "TCP6"),
        ("[::]:0", "127.0.0.1", "TCP4"),  # its addresses are ::ffff:127.0.0.1
        ("[::]:0", "::1", "TCP6"),
    ],
)
def test_proxy_protocol(listen: str, host: str, version: str) -> None:
    arguments = ("--proxy-protocol",)
    with (
        listening() as backend,
        proxying(backend.getsockname(), arguments=arguments, listen=listen) as proxy,
    ):
        address = (host, proxy.address[1])
        with socket.create_connection(address, GUARD) as client, accept(backend) as server:
            port = client.getsockname()[1]
            header = f"PROXY {version} {host} {host} {port} {address[1]}\r\n".encode()
            received = server.recv(200)  # the client need not say anything
            assert received == header
            client.sendall(b"data")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(server) == b"data"
        counts = proxy.idle()["backends"][shown(backend.getsockname())]
        assert counts["bytes_to_backend"] == 4


def test_counters() -> None:
    with listening() as backend, proxying(backend.getsockname()) as proxy:
        assert proxy.counts() == {
            "pid": proxy.process.pid,
            "clients": {"open": 0, "total": 0, "refused": 0},
            "backends": {
                shown(backend.getsockname()): {
                    "open": 0,
                    "total": 0,
                    "failed": 0,
                    "broken": 0,
                    "bytes_to_backend": 0,
                    "bytes_to_client": 0,
                }
            },
            "gsplice": proxy.counts()["gsplice"],
        }
        with proxy.connect() as client, accept(backend) as server:
            client.sendall(b"x")
            assert server.recv(10) == b"x"
            counts = proxy.counts()
            assert counts["clients"] == {"open": 1, "total": 1, "refused": 0}
            assert counts["backends"][shown(backend.getsockname())]["open"] == 1
            assert counts["gsplice"]["bytes_copied"] == 1


def test_nothing_is_left_open() -> None:
    def descriptors() -> int:
        pipes = proxy.idle()["gsplice"]["pipes_idle"]
        return len(os.listdir(f"/proc/{proxy.process.pid}/fd")) - 2 * pipes

    with echoing() as up, nobody() as down, proxying(up, down, errors="Backend .*\n") as proxy:
        before = None
        for _ in range(4):
            with proxy.connect() as client:
                assert exchange(client, DATA[:MiB]) == DATA[:MiB]
            before = before or descriptors()
        assert descriptors() == before


# ---- its end


@pytest.fixture
def under_way() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A transfer with its first half done: the proxy, the client, the server."""
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(listening())
        proxy = stack.enter_context(proxying(backend.getsockname(), arguments=("--grace", "100")))
        client = stack.enter_context(proxy.connect())
        server = stack.enter_context(accept(backend))
        server.sendall(b"half")
        assert client.recv(10) == b"half"
        yield proxy, client, server


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_may_end(under_way: Any, number: int) -> None:
    proxy, client, server = under_way
    proxy.process.send_signal(number)
    proxy.until_refused()
    # The fixture's ends are read and written by one thread: what fits into the sockets.
    server.sendall(DATA[:100_000])
    server.shutdown(socket.SHUT_WR)
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == DATA[:100_000]
    proxy.ended()


def test_second_signal_ends_it_at_once(under_way: Any) -> None:
    proxy, client, server = under_way
    proxy.process.send_signal(signal.SIGTERM)
    proxy.until_refused()
    assert proxy.until(lambda counts: counts["clients"]["open"] == 1)  # the one
    proxy.stop()
    assert is_reset(client)
    assert is_reset(server)


def test_end_of_the_grace_time() -> None:
    with (
        echoing() as backend,
        proxying(backend, arguments=("--grace", "0.1")) as proxy,
        proxy.connect() as client,
    ):
        assert exchange(client, b"x") == b"x"
        proxy.stop()
        assert is_reset(client)


# ---- several workers


def test_workers() -> None:
    """Both get something to do, and all that is done is counted."""
    with http_server() as backend, proxying(backend, arguments=("--workers", "2")) as proxy:
        rounds = 0
        while not all(each["clients"]["total"] for each in proxy.all_counts()):
            assert rounds < 30, "the kernel shares out connections by a hash of their ports"
            assert sha256(curl(proxy.url)) == sha256(DATA)
            rounds += 1
        both = proxy.all_counts()
        assert len({each["pid"] for each in both} - {proxy.process.pid}) == 2
        assert sum(each["backends"][shown(backend)]["total"] for each in both) == rounds
        assert all(each["gsplice"]["bytes_spliced"] > MUCH for each in both)


def test_worker_that_dies_is_replaced() -> None:
    errors = r"Worker \d+ has ended \(-9\); another one follows\n"
    with (
        echoing() as backend,
        proxying(backend, arguments=("--workers", "2"), errors=errors) as proxy,
    ):
        before = {each["pid"] for each in proxy.all_counts()}
        os.kill(min(before), signal.SIGKILL)
        deadline = time.monotonic() + GUARD
        while len(children(proxy.process.pid) - {min(before)}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        after = {each["pid"] for each in proxy.all_counts()}
        assert len(after) == 2
        assert len(after & before) == 1


def test_workers_end_with_their_parent() -> None:
    with echoing() as backend:
        with contextlib.suppress(Killed), proxying(backend, arguments=("--workers", "2")) as proxy:
            workers = {each["pid"] for each in proxy.all_counts()}
            raise Killed  # ended_with() kills it, then
        deadline = time.monotonic() + GUARD
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "they are still there"
            time.sleep(0.01)


class Killed(Exception):
    pass


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ctrl_c_with_workers() -> None:
    """The terminal tells the whole process group; each worker must hear of it once."""
    with listening() as backend:
        arguments = ("--workers", "2", "--grace", "100")
        with proxying(backend.getsockname(), arguments=arguments) as proxy:
            workers = {each["pid"] for each in proxy.all_counts()}
            assert all(os.getpgid(worker) == worker for worker in workers)
            with proxy.connect() as client, accept(backend) as server:
                os.killpg(proxy.process.pid, signal.SIGINT)
                proxy.until_refused()
                server.sendall(b"answer")
                server.shutdown(socket.SHUT_WR)
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == b"answer"
            proxy.ended()


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# ---- the command line


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --to"),
        (["--to", "here"], "argument --to: 'here' is not HOST:PORT, or [IPV6]:PORT"),
        (["--to", "a:1", "--workers", "0"], "argument --workers: 0 is not a number from 1 up"),
        (["--to", "a:1", "--grace", "nan"], "argument --grace: nan is not a number of seconds"),
    ],
)
def test_wrong_arguments(options: list[str], message: str) -> None:
    done = subprocess.run(
        command(PROGRAM, *options), env=environment(), capture_output=True, text=True, timeout=GUARD
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_that_is_taken(workers: str) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = shown(sock.getsockname())
        options = ["--to", "a:1", "--listen", address, "--workers", workers]
        done = subprocess.run(
            command(PROGRAM, *options),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=GUARD,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot listen on {address}: ")
