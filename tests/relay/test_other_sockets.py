"""Sockets that are no plain streams of this hub, other hubs, and forks."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from conftest import (
    counting,
    digest,
    ended_with,
    receive_all,
    receiver,
    run_program,
    some_bytes,
)
from ends import GUARD, MiB, is_waited_for, until
from relayed import BIG, Relayed, exchange, send_and_end

import gsplice

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-keyout", path, "-out", path.with_suffix(".crt")],
        check=True,
        capture_output=True,
    )
    with path.open("ab") as file:
        file.write(path.with_suffix(".crt").read_bytes())
    return path


def tls(certificate: Path, plain: Any, peer: Any) -> tuple[Any, Any]:
    """Wrap both ends of a connection: the first is the TLS client's."""
    server_side = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    client_side = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_mode = gevent.ssl.CERT_NONE
    shaking = gevent.spawn(
        server_side.wrap_socket, peer, server_side=True, suppress_ragged_eofs=False
    )
    client = client_side.wrap_socket(plain, suppress_ragged_eofs=False)
    return client, shaking.get(timeout=GUARD)


@pytest.mark.parametrize("first", ["plain", "tls"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_tls_on_one_side(certificate: Path, side: str, first: str) -> None:
    """No byte is lost, whoever ends first, and the TLS peer gets its close_notify."""
    relayed = Relayed()
    if side == "a":
        relayed.client, relayed.a = tls(certificate, relayed.client, relayed.a)
        encrypted, plain = relayed.client, relayed.server
    else:
        relayed.b, relayed.server = tls(certificate, relayed.b, relayed.server)
        encrypted, plain = relayed.server, relayed.client
    for sock in (relayed.a, relayed.b, encrypted):
        relayed.callback(sock.close)
    from_plain, from_tls = some_bytes(BIG), some_bytes(1 * MiB, seed=1)

    def speak_tls() -> bytes:
        received = bytearray()
        while len(received) < BIG:
            received += encrypted.recv(1 << 16)
        encrypted.sendall(from_tls)
        encrypted.unwrap()  # waits until the other side has said the same
        return bytes(received)

    with relayed, counting() as grown:
        speaking = gevent.spawn(speak_tls)
        arrived = receiver(plain)
        if first == "plain":
            send_and_end(plain, from_plain)
            assert digest(arrived.get(timeout=GUARD)) == digest(from_tls)
        else:
            plain.sendall(from_plain)
            assert digest(arrived.get(timeout=GUARD)) == digest(from_tls)
            assert not relayed.relay.dead
            plain.shutdown(socket.SHUT_WR)
        assert digest(speaking.get(timeout=GUARD)) == digest(from_plain)
        assert sorted(relayed.result()) == [len(from_tls), len(from_plain)]
    assert grown.fallbacks == {"socket_type": 1}


def test_tls_is_no_plain_bytes_after_a_half_close(certificate: Path) -> None:
    """gevent's shutdown() of a TLS socket ends decryption: recv() would give ciphertext."""
    relayed = Relayed()
    relayed.b, server = tls(certificate, relayed.b, relayed.server)
    with relayed, relayed.b, server:
        relayed.client.sendall(b"request")
        relayed.client.shutdown(socket.SHUT_WR)
        assert server.recv(100) == b"request"
        gevent.sleep(0.01)
        server.sendall(b"answer")
        assert relayed.client.recv(100) == b"answer"
        server.close()  # without close_notify
        assert isinstance(relayed.error(), OSError)  # gevent was told to tell such an end


def test_a_subclass_with_its_own_recv_gets_its_way(unix: Any) -> None:
    class Shouting(gevent.socket.socket):
        def recv(self, *args: Any) -> bytes:
            return super().recv(*args).upper()

    (client, a), (b, server) = unix(), unix()
    shouting = Shouting(fileno=a.detach())
    with shouting, counting() as grown:
        relaying = gevent.spawn(gsplice.relay, shouting, b, initial=(b"first ", b""))
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == b"first HELLO"
        server.sendall(b"quiet")
        server.close()
        assert receive_all(client) == b"quiet"
        assert relaying.get(timeout=GUARD) == (11, 5)
    assert grown.fallbacks == {"socket_type": 1}


def test_what_is_no_stream_socket_of_this_hub(unix: Any) -> None:
    sock, _ = unix()
    native, other = socket.socketpair()
    datagrams, _ = gevent.socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    non_blocking, _ = unix()
    non_blocking.setblocking(False)
    for wrong, error, message in (
        (native, TypeError, "b is a native socket"),
        (datagrams, TypeError, "b must be a stream socket"),
        (object(), TypeError, "b must be a socket"),
        (non_blocking, ValueError, "b has timeout 0"),
        (sock, ValueError, "same socket"),
    ):
        with pytest.raises(error, match=message):
            gsplice.relay(sock, wrong)
    for each in (native, other, datagrams):
        each.close()


def test_a_socket_of_another_threads_hub(unix: Any) -> None:
    sock, _ = unix()
    errors = []

    def run() -> None:
        ours, peer = gevent.socket.socketpair()
        try:
            gsplice.relay(ours, sock)
        except ValueError as err:
            errors.append(str(err))
        for each in (ours, peer):
            each.close()
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(GUARD)
    assert len(errors) == 1
    assert "another thread" in errors[0]


def test_a_closed_socket(unix: Any) -> None:
    (a, _), (b, _) = unix(), unix()
    b.close()
    with pytest.raises(OSError, match=r"Bad file|closed") as caught:
        gsplice.relay(a, b)
    assert caught.value.errno == errno.EBADF


def test_a_socket_that_somebody_reads_from_already(unix: Any) -> None:
    (a, _), (b, _) = unix(), unix()
    reading = gevent.spawn(b.recv, 1)
    until(lambda: is_waited_for(b, "read"))
    with pytest.raises(gevent.exceptions.ConcurrentObjectUseError):
        gsplice.relay(a, b)
    reading.kill()


# ---- threads and processes


def test_two_hubs_in_two_threads() -> None:
    results = []

    def run(seed: int) -> None:
        with Relayed() as relayed:
            exchange(relayed, some_bytes(BIG, seed), some_bytes(BIG, seed + 1))
            results.append(relayed.result())
        gevent.get_hub().destroy(destroy_loop=True)

    threads = [threading.Thread(target=run, args=(10 * n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert results == [(BIG, BIG)] * 2


INHERIT = """
import json, os, sys, gevent, gevent.os, gevent.socket, gsplice
a, b = (gevent.socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
stalled = sys.argv[3] == "stalled"
relaying = gevent.spawn(gsplice.relay, a, b)
event = b._write_event if stalled else a._read_event
with gevent.Timeout(30):
    while event.callback is None:
        gevent.sleep(0.001)
figures = gsplice.stats()
pid = gevent.os.fork_gevent()
if pid == 0:
    error = None
    try:
        with gevent.Timeout(30):
            relaying.join()
        error = getattr(relaying.exception, "errno", repr(relaying.exception))
    except BaseException as err:
        error = repr(err)
    grown = gsplice.stats()
    moved = grown.bytes_spliced + grown.bytes_copied
    moved -= figures.bytes_spliced + figures.bytes_copied
    os.write(1, json.dumps(["child", error, moved, grown.pipes_in_use]).encode() + b"\\n")
    os._exit(0)
os.write(1, b'"forked"\\n')
assert os.waitpid(pid, 0)[1] == 0
with gevent.Timeout(60):
    result = relaying.get()
os.write(1, json.dumps(["parent", *result, gsplice.stats().pipes_in_use]).encode() + b"\\n")
os._exit(0)
"""


@pytest.mark.parametrize("phase", ["stalled", "waiting"])
def test_a_relay_under_way_at_a_fork_ends_in_the_child(phase: str) -> None:
    """The child, which shares the sockets, moves nothing and half-closes nothing."""
    (client, a), (b, server) = (socket.socketpair() for _ in range(2))
    data = some_bytes(3 * MiB)
    command = [sys.executable, "-c", INHERIT, str(a.fileno()), str(b.fileno()), phase]
    with ended_with(command, pass_fds=(a.fileno(), b.fileno())) as process:
        a.close()
        b.close()
        assert process.stdout is not None

        def feed() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        feeder = threading.Thread(target=feed)
        if phase == "stalled":
            feeder.start()
        assert process.stdout.readline() == b'"forked"\n'
        if phase == "waiting":
            feeder.start()
        arrived = receive_all(server)
        server.sendall(b"thanks")
        server.close()
        assert receive_all(client) == b"thanks"
        reports = [json.loads(line) for line in process.stdout]
        feeder.join(GUARD)
    client.close()
    assert digest(arrived) == digest(data)
    assert reports == [["child", errno.ECANCELED, 0, 0], ["parent", len(data), 6, 0]]


def test_without_monkey_patching_and_without_patch_all() -> None:
    """relay() is a function like any other: nothing has to be patched for it."""
    program = """
import gevent, gevent.socket, gsplice
client, a = gevent.socket.socketpair()
b, server = gevent.socket.socketpair()
relaying = gevent.spawn(gsplice.relay, a, b)
client.sendall(b"x")
assert server.recv(1) == b"x"
client.close()
server.close()
print(relaying.get())
a.close()
b.close()
"""
    assert run_program(program) == "RelayResult(a_to_b=1, b_to_a=0)\n"
