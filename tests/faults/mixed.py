"""Transfers of every sort at the same time, each with bytes that no other has."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
from ends import GUARD
from gevent.fileobject import FileObject

import gsplice
from gsplice.config import settings

#: What a stream consists of: its number, again and again, which no other stream has.
MARK = 16


def stream(number: int, size: int) -> bytes:
    return b"<%014d>" % number * (size // MARK)


class Mixed:
    """Transfers of every sort at the same time, some of which are killed or lose their peer."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.chance = random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.strays: list[str] = []

    def run(self, number: int) -> None:
        chance = self.chance
        size = chance.choice([4_096, 60_000, 200_000, 800_000])
        data = stream(number, size)
        way = chance.choice(["copy", "copyfileobj", "sendfile", "pipe", "to file"])
        fate = chance.choice(["whole", "whole", "killed", "peer gone", "feeder gone"])
        settings.offload = chance.choice(["auto", "auto", "always"])
        taken = bytearray()
        sink, target = gevent.socket.socketpair()
        others = [gevent.spawn(self.drain, target, taken, fate == "peer gone")]
        with contextlib.ExitStack() as stack:
            stack.enter_context(sink)
            if way == "sendfile":
                path = self.directory / f"{number}"
                path.write_bytes(data)
                file = stack.enter_context(path.open("rb"))
                path.unlink()
                moving = gevent.spawn(sink.sendfile, file)
            else:
                ours, feeder = gevent.socket.socketpair()
                stack.enter_context(ours)
                others.append(gevent.spawn(self.feed, feeder, data, fate == "feeder gone"))
                moving = self.start(way, ours, sink, stack)
            if fate == "killed":
                gevent.sleep(chance.randint(0, 2) / 1000)
                moving.kill()
            moving.join(GUARD)
            assert moving.dead, f"{way}, {fate} hangs"
        for greenlet in others:
            greenlet.join(GUARD)
            assert greenlet.dead
        if way == "to file":
            taken += moving.place.read_bytes()
            moving.place.unlink()
        self.check(number, data, bytes(taken), moving, f"{way}, {fate}")

    def start(self, way: str, ours: Any, sink: Any, stack: contextlib.ExitStack) -> Any:
        if way == "copy":
            return gevent.spawn(gsplice.copy, ours, sink)
        if way == "to file":
            place = self.directory / f"{random.random()}"
            moving = gevent.spawn(gsplice.copy, ours, stack.enter_context(place.open("wb", 0)))
            moving.place = place
            return moving
        if way == "copyfileobj":
            src, dst = ours.makefile("rb", 0), sink.makefile("wb", 0)
            stack.callback(src.close)
            stack.callback(dst.close)
            return gevent.spawn(gsplice.copyfileobj, src, dst)
        reader, writer = os.pipe()
        source = stack.enter_context(FileObject(reader, "rb", 0))
        into = stack.enter_context(FileObject(writer, "wb", 0))

        def second() -> int:
            with source:  # closed at its end, so that the first does not wait for it
                return gsplice.copy(source, sink)

        def both() -> int:
            moving = gevent.spawn(second)
            try:
                gsplice.copy(ours, into)
            finally:
                into.close()
                moving.join()
            return moving.get()

        return gevent.spawn(both)

    def feed(self, feeder: Any, data: bytes, gone: bool) -> None:
        with feeder, contextlib.suppress(OSError):
            feeder.sendall(data[: len(data) // 2] if gone else data)

    def drain(self, target: Any, taken: bytearray, gone: bool) -> None:
        with target, contextlib.suppress(OSError):
            while piece := target.recv(1 << 16):
                taken += piece
                if gone and len(taken) > 1 << 16:
                    return

    def check(self, number: int, data: bytes, taken: bytes, moving: Any, what: str) -> None:
        if not data.startswith(taken):
            found = set(re.findall(rb"<(\d{14})>", taken)) - {b"%014d" % number}
            self.strays.append(f"{number} ({what}) got bytes of {sorted(found)[:5]}")
        elif moving.successful() and not isinstance(moving.value, BaseException):
            whole = "feeder gone" in what or len(taken) == len(data) or "peer gone" in what
            self.ended["whole"] += whole
            if not whole:
                self.strays.append(f"{number} ({what}) lost bytes, and nobody was told")
        else:
            self.ended["told"] += 1
