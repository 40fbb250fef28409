"""A FUSE filesystem over a directory, in a process of its own, that waits until a test lets it go.

``python slowfs.py DIRECTORY MOUNT CONTROL [options]`` serves it; :class:`SlowFS` starts that, and
is what a test talks to. They talk through files in CONTROL: no test has to guess how long anything
takes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Seconds after which a held request is let go: a hub that waits for it would never come to do so.
MOST_HELD = 15


def serve() -> None:
    from fuse import FUSE, FuseOSError, Operations

    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("mount", type=Path)
    parser.add_argument("control", type=Path)
    parser.add_argument("--delay", type=float, default=0, help="seconds for each read and write")
    parser.add_argument("--direct-io", action="store_true", help="no page cache")
    parser.add_argument("--single-threaded", action="store_true", help="one request at a time")
    parser.add_argument("--sizeless", action="store_true", help="every file's size is said to be 0")
    parser.add_argument("--more", type=int, help="sizes are said to be so much more, at least 1")
    options = parser.parse_args()
    log = os.open(options.control / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def answer(operation: str, path: str, offset: int, size: int) -> None:
        """Return when the test lets this request go. Raises the error that it is to have."""
        note = f"{operation} {path[1:]} {offset} {size}"
        os.write(log, f"begun {note}\n".encode())
        time.sleep(options.delay)
        began = time.monotonic()
        while offset + size > _number(options.control / f"hold-{operation}-{path[1:]}"):
            if time.monotonic() - began > MOST_HELD:
                os.write(log, f"expired {note}\n".encode())
                break
            time.sleep(0.001)
        for name in ("EAGAIN", "EIO", "ESTALE", "ENOSPC"):
            if offset + size > _number(options.control / f"{name}-{operation}-{path[1:]}"):
                raise FuseOSError(getattr(errno, name))

    class Files(Operations):
        use_ns = True

        def __call__(self, operation: str, path: str, *args: Any) -> Any:
            try:
                return super().__call__(operation, path, *args)
            except FuseOSError:
                raise
            except OSError as err:
                raise FuseOSError(err.errno) from None

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            status = os.lstat(behind(path))
            names = ("st_gid", "st_mode", "st_nlink", "st_size", "st_uid")
            times = {f"st_{which}time": getattr(status, f"st_{which}time_ns") for which in "acm"}
            attributes = times | {name: getattr(status, name) for name in names}
            if options.more is not None and stat.S_ISREG(status.st_mode):
                return attributes | {"st_size": max(1, status.st_size + options.more)}
            return attributes | {"st_size": 0} if options.sizeless else attributes

        def open(self, path: str, flags: int) -> int:
            return os.open(behind(path), flags)

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return os.open(behind(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            answer("read", path, offset, size)
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            answer("write", path, offset, len(data))
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.truncate(behind(path), length)

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

    def behind(path: str) -> Path:
        return options.directory / path[1:]

    FUSE(
        Files(),
        str(options.mount),
        foreground=True,
        nothreads=options.single_threaded,
        direct_io=options.direct_io,
        kernel_cache=not options.direct_io,  # what has been read stays, over close and open
        big_writes=True,
        # A few held requests must not make the kernel keep others back.
        max_background=1000,
        congestion_threshold=1000,
        # One request at a time: the kernel shall not ask for what it knows.
        attr_timeout=3600 if options.single_threaded else 1,
        entry_timeout=3600 if options.single_threaded else 1,
        # Modes count, and every user may come in.
        default_permissions=True,
        allow_other=os.geteuid() == 0,
    )


def _number(path: Path) -> float:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return float("inf")


class SlowFS(contextlib.ExitStack):
    """The filesystem, mounted as long as the block runs; every operation is let through at first.

    Files are made in :attr:`directory`, where nothing is held, and none is in the page cache of
    the mount.
    """

    def __init__(self, place: Path, *options: str) -> None:
        super().__init__()
        self.directory, self.mount, self.control = (
            place / name for name in ("behind", "mount", "control")
        )
        self.options = options

    def __enter__(self) -> SlowFS:
        super().__enter__()
        with contextlib.ExitStack() as stack:
            for path in (self.directory, self.mount, self.control):
                path.mkdir()
            (self.control / "log").touch()
            command = [sys.executable, __file__, self.directory, self.mount, self.control]
            process = stack.enter_context(subprocess.Popen([*command, *self.options]))
            stack.callback(process.kill)
            stack.callback(self._end, process)
            while not self.mount.is_mount():
                assert process.poll() is None, "the filesystem ended"
                time.sleep(0.005)
            self.push(stack.pop_all())
        return self

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self.let_go()
        subprocess.run(["fusermount3", "-uz", self.mount], check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)

    def hold(self, name: str, operation: str = "read", beyond: int = 0) -> None:
        """From now on, keep back what is asked of the file *name* after its first bytes."""
        self._tell(f"hold-{operation}-{name}", beyond)

    def release(self, name: str, operation: str = "read") -> None:
        """Let everything go that :meth:`hold` keeps back."""
        (self.control / f"hold-{operation}-{name}").unlink()
        expired = [line for line in self._log() if line[:3] == ["expired", operation, name]]
        assert not expired, "nobody came to let these go: the hub waited for them"

    def let_go(self) -> None:
        """Let everything go, whatever a test has left."""
        for gate in self.control.glob("hold-*"):
            gate.unlink()

    def fail(self, error: str, name: str, operation: str = "read", beyond: int = 0) -> None:
        """From now on, answer *error* to what reaches *beyond* the first bytes of the file."""
        self._tell(f"{error}-{operation}-{name}", beyond)

    def _tell(self, name: str, number: int) -> None:
        new = self.control / "new"
        new.write_text(str(number))
        new.rename(self.control / name)

    def begun(self, name: str, operation: str = "read", beyond: int = 0) -> bool:
        """Say whether the filesystem has been asked for what is beyond the file's first bytes."""
        return any(
            line[:3] == ["begun", operation, name] and int(line[3]) + int(line[4]) > beyond
            for line in self._log()
        )

    def order(self, operation: str = "read") -> list[str]:
        """Return the names of the files in the order in which the filesystem was asked for them."""
        begun = (line[2] for line in self._log() if line[:2] == ["begun", operation])
        return list(dict.fromkeys(begun))

    def _log(self) -> list[list[str]]:
        return [line.split() for line in (self.control / "log").read_text().splitlines()]


if __name__ == "__main__":
    serve()
