"""Each kind of object is taken or refused for the right reason, by its exact type."""

from __future__ import annotations

import io
import os
import shutil
import socket as stdlib_socket
import socketserver
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from bench import ForeignRaw
from conftest import counting, receiver
from ends import is_waited_for, until
from gevent.fileobject import FileObjectPosix
from gevent.monkey import get_original
from kinds import FILE, PIPE, SINKS, SOCKET, SOURCES
from paths import PROJECT
from recognising import BIG, role

from gsplice._ends import recognise
from gsplice._ends.recognise import regular_file, sink, source, stream_socket


@pytest.mark.parametrize("kind", SOURCES, ids=str)
def test_source(bench, kind):
    assert role(source, bench.keep(kind.make(bench, b"some bytes"))) == kind.role


@pytest.mark.parametrize("kind", SOURCES, ids=str)
def test_only_a_regular_file_is_a_regular_file(bench, kind):
    expected = "source_type" if kind.role in (SOCKET, PIPE) else kind.role
    assert role(regular_file, bench.keep(kind.make(bench, b"some bytes"))) == expected


@pytest.mark.parametrize("kind", SINKS, ids=str)
def test_sink(bench, kind):
    obj, _ = kind.make(bench)
    assert role(sink, bench.keep(obj)) == kind.role


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_spooled_file_is_not_rolled_over(bench, size):
    file = bench.keep(tempfile.SpooledTemporaryFile(1 << 20))
    file.write(bytes(size))
    file.seek(0)
    sender, _ = bench.pair()
    with counting() as grown:
        shutil.copyfileobj(file, io.BytesIO())
        file.seek(0)
        assert sender.sendfile(file) == size
    assert not file._rolled
    assert grown.fallbacks == {"source_type": 2}


@pytest.mark.parametrize("name", ["read", "fileno", "seek", "write", "tell", "flush"])
def test_a_temporary_file_whose_methods_were_used_is_still_taken(bench, name):
    file = bench.keep(tempfile.NamedTemporaryFile(dir=bench.path().parent))
    getattr(file, name)
    assert name in file.__dict__
    assert role(source, file) == role(sink, file) == FILE


@pytest.mark.parametrize("name", ["read", "readinto", "write"])
def test_a_wrapper_that_now_wraps_something_else_is_not_taken(bench, name):
    """Its methods, once asked for, go on leading to the first file."""
    file = bench.keep(tempfile.NamedTemporaryFile(dir=bench.path().parent))
    getattr(file, name)
    file.file = bench.keep(open(bench.path(), "r+b"))
    assert role(source, file) == "source_type"


METHODS = ["read", "read1", "readinto", "readall", "peek", "write", "seek", "tell", "fileno"]


@pytest.mark.parametrize("layer", ["buffer", "raw"])
@pytest.mark.parametrize("name", METHODS)
def test_an_instance_with_a_method_of_its_own_is_not_taken(bench, name, layer):
    file = bench.keep(bench.path(b"some bytes").open("r+b"))
    target = file if layer == "buffer" else file.raw
    setattr(target, name, lambda *args: pytest.fail("was called"))
    assert role(source, file) == "source_type"
    assert role(sink, file) == "destination_type"
    delattr(target, name)
    assert role(source, file) == FILE


def test_a_foreign_object_is_not_touched():
    class Foreign:
        def __getattribute__(self, name: str) -> Any:
            pytest.fail(f"asked for {name}")

        __len__ = __bool__ = __eq__ = __hash__ = __iter__ = lambda self: pytest.fail("was asked")

    foreign = Foreign()
    assert role(source, foreign) == role(regular_file, foreign) == "source_type"
    assert role(sink, foreign) == "destination_type"
    assert role(stream_socket, foreign) == "socket_type"


@pytest.mark.parametrize("foreign", ["type", "instance"])
def test_the_fileno_of_a_foreign_raw_object_is_not_asked_for(bench, foreign):
    """It may have side effects, as SpooledTemporaryFile's has, and raise anything."""

    class Raw(ForeignRaw):
        def fileno(self) -> int:
            pytest.fail("was called")

    raw: Any = io.FileIO(bench.path(BIG[:1000]))
    if foreign == "type":
        raw = Raw(raw)
    else:
        raw.fileno = lambda: pytest.fail("was called")
    file = bench.keep(io.BufferedReader(raw))
    with counting() as grown:
        assert bench.pair()[0].sendfile(file) == 1000
        shutil.copyfileobj(file, bench.keep(open(bench.path(), "wb")))
    assert grown.fallbacks == {"source_type": 2}


def test_a_wrapper_of_the_same_name_is_not_taken_for_the_real_one(bench):
    impostor = type("_TemporaryFileWrapper", (), {"__module__": "tempfile"})()
    impostor.file = bench.keep(open(bench.path(b"some bytes"), "rb"))
    assert role(source, impostor) == "source_type"


def test_a_class_whose_module_cannot_be_hashed_is_not_taken() -> None:
    odd = type("Odd", (io.BytesIO,), {"__module__": []})
    copied = io.BytesIO()
    shutil.copyfileobj(odd(b"odd"), copied)
    assert copied.getvalue() == b"odd"


def test_a_class_that_cannot_be_hashed_is_not_taken(bench):
    class Meta(type):
        def __eq__(cls, other: object) -> bool:
            return cls is other

        __hash__ = None  # type: ignore[assignment]

    class Odd(metaclass=Meta):
        def read(self, size: int) -> bytes:
            return b""

    copied = io.BytesIO()
    shutil.copyfileobj(Odd(), copied)
    assert bench.pair()[0].sendfile(Odd()) == 0


def test_recognising_imports_nothing():
    script = """
        import io, os, shutil, sys
        import gsplice
        from gsplice._ends.recognise import NotOurs, sink, source, stream_socket

        gsplice.patch_all()

        def named(module, name):
            return type(name, (), {"__module__": module})()

        objects = [
            open(os.devnull, "rb"), open(sys.executable, "rb"), io.BytesIO(), object(), None, len,
            named("tempfile", "_TemporaryFileWrapper"),
            named("gevent._fileobjectposix", "FileObjectPosix"),
            named("gevent._fileobjectposix", "GreenFileDescriptorIO"),
            named("gevent._fileobjectcommon", "FileObjectBlock"),
            named("gzip", "GzipFile"), named("nowhere", "Nothing"), named("ssl", "SSLSocket"),
        ]
        before = set(sys.modules)
        for recognised in (source, sink, stream_socket):
            for obj in objects:
                try:
                    recognised(obj)
                except NotOurs:
                    pass
        shutil.copyfileobj(io.BytesIO(b"x"), io.BytesIO())
        print(sorted(set(sys.modules) - before))
        from gevent._hub_local import get_hub_if_exists
        print(get_hub_if_exists())
    """
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(script),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\nNone\n", "")


# --- closed under way ---


@pytest.mark.parametrize("victim", ["socket", "file"])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_sendfile_when_another_greenlet_closes_it(bench, victim, tcp):
    def attempt(function: Callable[..., Any]) -> tuple[type[BaseException], int | None]:
        sender, peer = bench.pair(tcp)
        file = bench.keep(open(bench.path(BIG * 4), "rb"))
        sending = gevent.spawn(function, sender, file)
        peer.recv(1)
        until(lambda: is_waited_for(sender))
        (sender if victim == "socket" else file).close()
        received = receiver(peer)
        sending.join()
        sender.close()
        received.get()
        err = sending.exception
        assert err is not None
        return type(err), getattr(err, "errno", None)

    wanted = attempt(get_original("gevent._socket3.socket", "sendfile"))
    with counting() as grown:
        assert attempt(gevent.socket.socket.sendfile) == wanted
    assert grown.bytes_spliced > 0


@pytest.mark.parametrize("victim", ["source", "sink"])
@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_copyfileobj_when_another_greenlet_closes_it(bench, kind, victim):
    """The source gives some bytes and then nothing, so that the copy waits for it."""

    def attempt(function: Callable[..., Any]) -> tuple[type[BaseException], int | None]:
        if kind == "pipe":
            read_end, write_end = os.pipe()
            src = bench.keep(FileObjectPosix(read_end, "rb", 0))
            feed = bench.keep(open(write_end, "wb", 0)).write
        else:
            ours, theirs = bench.pair()
            src = bench.keep(ours.makefile("rb", 0))
            ours.close()  # the file keeps the connection
            feed = theirs.sendall
        sender, peer = bench.pair()
        dst = bench.keep(sender.makefile("wb", 0))
        copying = gevent.spawn(function, src, dst)
        feed(b"some bytes")
        assert peer.recv(100) == b"some bytes"
        gevent.idle()  # the copy waits for more now
        (src if victim == "source" else dst).close()
        if victim == "sink":
            feed(b"more")
        copying.join()
        return type(copying.exception), getattr(copying.exception, "errno", None)

    wanted = attempt(get_original("shutil", "copyfileobj"))
    with counting() as grown:
        assert attempt(shutil.copyfileobj) == wanted
    assert grown.bytes_spliced == len(b"some bytes")


# --- the cost ---


def test_extracting_a_zip_file_hands_every_member_on(tmp_path):
    archive = tmp_path / "many.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(300):
            file.writestr(f"{number}", b"small")
    with counting() as grown, zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 300
    assert grown.fallbacks == {"source_type": 300}
    assert grown.transfers == grown.pipes_created == 0


def test_what_is_never_ours_is_not_remembered():
    """Programs make classes by the thousand: each object of a mock has one."""
    before = len(recognise._known)
    for _ in range(100):
        assert role(source, type("Made", (), {})()) == "source_type"
    assert len(recognise._known) == before


# --- wrappers of other libraries ---


def test_what_socketserver_writes_to_is_its_socket(bench):
    sender, peer = bench.pair()
    writer = socketserver._SocketWriter(sender)
    assert role(sink, writer) == SOCKET
    assert role(source, writer) == "source_type"
    receiving = receiver(peer)
    with counting() as grown:
        shutil.copyfileobj(bench.keep(bench.path(BIG).open("rb")), writer)
    sender.close()
    assert receiving.get() == BIG
    assert (grown.bytes_spliced, grown.fallbacks) == (len(BIG), {})


def test_what_else_socketserver_may_write_to_is_not_ours(bench):
    class Writer(socketserver._SocketWriter):
        pass

    sender, _ = bench.pair()
    assert role(sink, Writer(sender)) == "destination_type"
    own = socketserver._SocketWriter(sender)
    own.write = own.write
    assert role(sink, own) == "destination_type"
    with stdlib_socket.socket() as blocking:
        assert role(sink, socketserver._SocketWriter(blocking)) == "socket_type"
    sender.close()
    assert role(sink, socketserver._SocketWriter(sender)) == "closed"


def test_djangos_file_is_the_file_in_it(bench):
    django = pytest.importorskip("django.core.files.base")

    class Own(django.File):
        pass

    def make(cls=django.File):
        return cls(bench.keep(bench.path(b"some bytes").open("r+b")))

    assert role(source, make()) == role(sink, make()) == FILE
    assert role(source, make(Own)) == role(source, django.ContentFile(b"x")) == "source_type"
    closed = make()
    closed.close()
    assert role(source, closed) == "closed"
    closed.file = None
    assert role(source, closed) == "source_type"


def test_djangos_field_files_and_uploads_are_the_file_in_them(bench):
    django = pytest.importorskip("django.core.files.base")
    fields = pytest.importorskip("django.db.models.fields.files")
    uploaded = pytest.importorskip("django.core.files.uploadedfile")
    stored = django.File(bench.keep(bench.path(BIG).open("rb")))
    storage = SimpleNamespace(open=lambda name, mode: stored)
    field = fields.FieldFile(None, SimpleNamespace(storage=storage), "name")
    assert role(source, field) == FILE
    with counting() as grown:
        shutil.copyfileobj(field, bench.keep(bench.path().open("wb")))
    assert grown.transfers == 1
    assert stored.tell() == field.tell() == len(BIG)
    stored.file.read = lambda size: b""
    assert role(source, field) == "source_type"

    upload = uploaded.TemporaryUploadedFile.__new__(uploaded.TemporaryUploadedFile)
    upload.file = bench.keep(tempfile.NamedTemporaryFile())
    assert role(source, upload) == FILE
