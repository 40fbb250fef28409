"""Sockets are taken by their exact type, of the caller's own hub."""

from __future__ import annotations

import os
import shutil
import socket as stdlib_socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from bench import Bench, PlainSubclass, as_class
from conftest import counting, receive_all, receiver
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original
from kinds import SOCKET
from recognising import BIG, role

from gsplice._ends.recognise import source, stream_socket


@pytest.mark.parametrize("family", [stdlib_socket.AF_INET, stdlib_socket.AF_INET6])
def test_tcp_sockets_are_taken(bench, family):
    assert role(stream_socket, bench.keep(gevent.socket.socket(family))) == SOCKET


@pytest.mark.parametrize(
    "kind",
    [
        (stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM),
        (stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM),
        (stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET),
        (stdlib_socket.AF_NETLINK, stdlib_socket.SOCK_RAW),
    ],
    ids=["udp", "unix datagram", "seqpacket", "netlink"],
)
def test_sockets_that_are_no_streams_are_not_taken(bench, kind):
    sock = bench.keep(gevent.socket.socket(*kind))
    assert role(stream_socket, sock) == "socket_type"
    assert role(source, bench.keep(sock.makefile("rb"))) == "socket_type"


def test_sendfile_keeps_the_messages_of_a_seqpacket_socket(bench):
    """gevent sends pieces of 8 KiB; each is one message."""
    sender, peer = map(
        bench.keep, gevent.socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
    )
    file = bench.keep(open(bench.path(BIG[:20_000]), "rb"))
    with counting() as grown:
        assert sender.sendfile(file) == 20_000
    assert [len(peer.recv(1 << 20)) for _ in range(3)] == [8192, 8192, 3616]
    assert grown.fallbacks == {"socket_type": 1}


SOCKET_METHODS = [
    *("send", "sendall", "sendmsg", "sendto", "recv", "recv_into", "recvfrom", "recvmsg"),
    *("fileno", "gettimeout", "_wait", "_sendfile_use_send", "_check_sendfile_params"),
]


@pytest.mark.parametrize("name", SOCKET_METHODS)
@pytest.mark.parametrize("where", ["class", "base", "instance"])
def test_a_socket_with_a_method_of_its_own_is_not_taken(bench, name, where):
    def own(*args: Any) -> None:
        pytest.fail("was called")

    cls: Any = PlainSubclass
    if where == "class":
        cls = type("Own", (PlainSubclass,), {name: own})
    elif where == "base":
        cls = type("Own", (type("Mixin", (), {name: own}), PlainSubclass), {})
    sock = cls()
    if where == "instance":
        setattr(sock, name, own)
    assert role(stream_socket, sock) == "socket_type"
    if where != "instance":
        sock._sock.close()
    else:
        delattr(sock, name)
        sock.close()


def test_a_subclass_that_changes_nothing_is_taken(bench):
    class WithOther(PlainSubclass):
        def getpeername(self) -> str:
            return "somebody"

    sender, peer = bench.pair()
    sender = as_class(bench, WithOther, sender)
    assert role(stream_socket, sender) == SOCKET
    received = receiver(peer)
    with counting() as grown:
        assert sender.sendfile(bench.keep(bench.path(BIG).open("rb"))) == len(BIG)
        sender.close()
        assert received.get() == BIG
    assert grown.bytes_spliced == len(BIG)


def test_the_plain_class_has_no_instance_dictionary(bench):
    """That is why an object of it is not looked at any further."""
    with pytest.raises(AttributeError):
        bench.pair()[0].send = None


def test_a_socket_of_the_standard_library_is_not_taken():
    with stdlib_socket.socket() as sock:
        assert role(stream_socket, sock) == "socket_type"


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_blocking_descriptor_is_not_taken(bench, timeout):
    sock, peer = bench.pair()
    sock.settimeout(timeout)
    os.set_blocking(sock.fileno(), True)
    assert role(stream_socket, sock) == "blocking"
    os.set_blocking(peer.fileno(), True)
    reader = bench.keep(stdlib_socket.socket(fileno=os.dup(peer.fileno())))
    received = bench.in_thread(receive_all, reader)
    with counting() as grown:
        assert sock.sendfile(bench.keep(bench.path(BIG).open("rb"))) == len(BIG)
    sock.close()
    assert received.get() == BIG
    assert grown.fallbacks == {"blocking": 1}


@pytest.mark.parametrize("gone", ["close", "detach"])
def test_a_socket_that_was_closed_is_not_taken(bench, gone):
    sock, _ = bench.pair()
    fd = sock.fileno()
    getattr(sock, gone)()
    assert role(stream_socket, sock) == "closed"
    if gone == "detach":
        os.close(fd)


def test_a_nonblocking_socket_is_not_taken(bench):
    sock, _ = bench.pair()
    sock.setblocking(False)
    assert role(stream_socket, sock) == "nonblocking"


def encrypted(bench: Bench) -> tuple[Any, Any]:
    """Return a pair of gevent's TLS sockets. Anonymous Diffie-Hellman needs no certificate."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = gevent.ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        contexts.append(context)
    one, other = bench.pair(tcp=True)
    server = bench.spawn(lambda: contexts[0].wrap_socket(one, server_side=True))
    client = bench.keep(contexts[1].wrap_socket(other))
    return bench.keep(server.get()), client


@pytest.mark.parametrize("size", [1000, 5 << 20])
def test_bytes_sent_over_tls_are_encrypted_by_the_original(bench, size):
    sender, peer = encrypted(bench)
    assert isinstance(sender, gevent.socket.socket)
    assert type(sender).sendfile is not get_original("gevent._socket3.socket", "sendfile")
    assert role(stream_socket, sender) == "socket_type"

    def read() -> bytes:
        return b"".join(iter(lambda: peer.recv(min(1 << 16, size)), b""))

    received = bench.spawn(read)
    with counting() as grown:
        assert sender.sendfile(bench.keep(open(bench.path(BIG[:size]), "rb"))) == size
        sender.shutdown(stdlib_socket.SHUT_WR)
        assert received.get() == BIG[:size]
    assert grown.bytes_spliced == grown.bytes_copied == 0


def test_files_of_tls_sockets_are_copied_by_the_original(bench):
    sender, peer = encrypted(bench)
    received = bench.spawn(lambda: peer.makefile("rb").read(len(BIG)))
    with counting() as grown:
        sink_file = sender.makefile("wb")
        shutil.copyfileobj(bench.keep(bench.path(BIG).open("rb")), sink_file)
        sink_file.flush()
        assert received.get() == BIG
    assert grown.fallbacks == {"socket_type": 1}
    assert grown.transfers == 0


# --- where the caller is ---


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Run *function* in a native thread that has no hub and return what it returns."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as err:  # noqa: BLE001 - for the caller
            results.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        gevent.sleep(0.001)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def test_a_socket_of_another_threads_hub_is_not_taken(bench):
    sock, _ = bench.pair()

    def elsewhere(with_hub: bool) -> str:
        if with_hub:
            gevent.get_hub()
        try:
            return role(stream_socket, sock)
        finally:
            if with_hub:
                gevent.get_hub().destroy(destroy_loop=True)

    assert in_a_thread(lambda: elsewhere(with_hub=False)) == "other_hub"
    assert in_a_thread(lambda: elsewhere(with_hub=True)) == "other_hub"
    assert role(stream_socket, sock) == SOCKET


def test_a_thread_without_a_hub_leaves_files_to_the_original_and_gets_no_hub(bench):
    """Several threads may write to one file: only write(2) takes the lock of its position."""
    src, dst = bench.path(BIG), bench.path()

    def copy() -> Any:
        with open(src, "rb") as fsrc, open(dst, "wb") as fdst:
            shutil.copyfileobj(fsrc, fdst)
        return get_hub_if_exists()

    with counting() as grown:
        assert in_a_thread(copy) is None
    assert dst.read_bytes() == BIG
    assert grown.fallbacks == {"other_hub": 1}


def test_a_thread_without_a_hub_leaves_pipes_to_the_original(bench):
    dst = bench.path()

    def copy() -> None:
        with open(bench.pipe_from(BIG[:10_000]), "rb") as fsrc, open(dst, "wb") as fdst:
            shutil.copyfileobj(fsrc, fdst)

    with counting() as grown:
        in_a_thread(copy)
    assert dst.read_bytes() == BIG[:10_000]
    assert grown.fallbacks == {"other_hub": 1}


def in_the_hub(function: Callable[[], Any]) -> Any:
    """Run *function* in the hub's own greenlet, which cannot wait."""
    result = gevent.event.AsyncResult()

    def run() -> None:
        try:
            result.set(function())
        except BaseException as err:  # noqa: BLE001 - for the caller
            result.set_exception(err)

    gevent.get_hub().loop.run_callback(run)
    return result.get()


def test_in_the_hub_a_socket_is_not_taken(bench):
    sock, _ = bench.pair()
    assert in_the_hub(lambda: role(stream_socket, sock)) == "other_hub"


def test_in_the_hub_sendfile_fails_as_the_original_does(bench):
    def attempt(function: Callable[..., Any]) -> type[BaseException]:
        sender, _ = bench.pair()
        file = bench.keep(bench.path(BIG).open("rb"))
        with pytest.raises(BaseException) as caught:
            in_the_hub(lambda: function(sender, file))
        return caught.type

    wanted = attempt(get_original("gevent._socket3.socket", "sendfile"))
    with counting() as grown:
        assert attempt(gevent.socket.socket.sendfile) is wanted
    assert grown.fallbacks == {"other_hub": 1}


def test_in_the_hub_files_are_copied(bench):
    dst = bench.path()

    def copy() -> None:
        with open(bench.path(BIG), "rb") as fsrc, open(dst, "wb") as fdst:
            shutil.copyfileobj(fsrc, fdst)

    in_the_hub(copy)
    assert dst.read_bytes() == BIG
