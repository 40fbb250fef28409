"""After a fork: what the child may touch, and what becomes of transfers under way."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, ended_with, run_program, some_bytes

MiB = 1 << 20

PROGRAM = """
import gc, json, os, sys, threading, warnings
warnings.simplefilter('ignore', DeprecationWarning)  # of forking with threads
{patching}
import gevent, gevent.monkey, gevent.os, gevent.socket, gsplice
from gsplice import pipes
from gsplice._pool import idle, lending
from gsplice._pool.pipe import alive, keys, reserve
from gsplice._counters import counters
from gsplice.pipes import acquire, release

def inode(pipe):
    return os.fstat(pipe.read_fd).st_ino

def open_inodes():
    links = []
    for fd in os.listdir('/proc/self/fd'):
        try:
            links.append(os.readlink('/proc/self/fd/' + fd))
        except FileNotFoundError:
            pass
    return {{int(link[6:-1]) for link in links if link.startswith('pipe:')}}

def fork_plainly(child):
    pid = {fork}()
    if pid == 0:
        try:
            child()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    # Not gevent's, which under libuv may lose a child for ever (gevent 26.9).
    status = gevent.monkey.get_original('os', 'waitpid')(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0

def fork_with_multiprocessing(child):
    import multiprocessing
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
"""

GEVENT = "import gevent.monkey; gevent.monkey.patch_all()"

FORKS = {
    "os.fork": PROGRAM.format(patching="", fork="os.fork") + "fork = fork_plainly\n",
    "gevent.os.fork": PROGRAM.format(patching="", fork="gevent.os.fork") + "fork = fork_plainly\n",
    "patched os.fork": PROGRAM.format(patching=GEVENT, fork="os.fork") + "fork = fork_plainly\n",
    "multiprocessing": PROGRAM.format(patching="", fork="os.fork")
    + "fork = fork_with_multiprocessing\n",
    "patched multiprocessing": PROGRAM.format(patching=GEVENT, fork="os.fork")
    + "fork = fork_with_multiprocessing\n",
}


@pytest.mark.few(3)
@pytest.mark.parametrize("fork", FORKS)
def test_the_child_has_none_of_the_parents_pipes(
    fork: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fork == "patched multiprocessing":
        # Its join() uses gevent's waitpid, which under libuv may lose a child for ever.
        monkeypatch.setenv("GEVENT_LOOP", "libev-cext")
    run_program(
        FORKS[fork]
        + """
gevent.get_hub()
lent = [acquire() for _ in range(4)]
kept = [acquire() for _ in range(4)]
inodes = {inode(pipe) for pipe in [*lent, *kept]}
def leave_to_all():
    pipe = acquire()
    inodes.add(inode(pipe))
    release(pipe)
gevent.monkey.get_original('_thread', 'start_new_thread')(leave_to_all, ())
with gevent.Timeout(30):
    while not idle.shared:  # until the thread has ended
        gevent.sleep(0.001)
while kept:
    release(kept.pop())
for pipe in lent[:3]:
    os.write(pipe.write_fd, b'from before the fork')
pipe = None

def child():
    assert not inodes & open_inodes()
    figures = gsplice.stats()
    assert (figures.pipes_in_use, figures.pipes_idle) == (0, 0)
    assert figures.pipes_created == figures.pipes_closed == 9
    for pipe in lent:
        assert (pipe.read_fd, pipe.write_fd) == (-1, -1)
        release(pipe)  # nothing
    mine = [acquire() for _ in range(12)]
    assert not inodes & {inode(pipe) for pipe in mine}
    assert gsplice.stats().acquired_new == 9 + 12
    lent.clear()
    gc.collect()
    assert not inodes & open_inodes()
    for pipe in mine:
        os.write(pipe.write_fd, b'mine')
        assert os.read(pipe.read_fd, 100) == b'mine'
    assert gsplice.stats().pipes_in_use == 12
    while mine:
        pipe = mine.pop()
        release(pipe)
    pipe = None
    for _ in range(3):
        gc.collect()
    assert gsplice.stats().pipes_idle == 4

fork(child)
assert inodes <= open_inodes()
for pipe in lent[:3]:
    assert os.read(pipe.read_fd, 100) == b'from before the fork'
for pipe in lent:
    release(pipe)
pipe = None
assert gsplice.stats().pipes_created == 9 and gsplice.stats().pipes_idle == 9
lent = [acquire() for _ in range(9)]
assert {inode(pipe) for pipe in lent} == inodes
fork(lambda: None)
"""
    )


def test_a_grandchild_has_none_of_its_ancestors_pipes() -> None:
    run_program(
        FORKS["gevent.os.fork"]
        + """
release(acquire())
first = inode(lending._local.keeper.home.idle[0])
def child():
    pipe = acquire()
    second = inode(pipe)
    release(pipe)
    pipe = None
    def grandchild():
        assert not {first, second} & open_inodes()
        release(acquire())
        assert gsplice.stats().acquired_new == 3
    fork(grandchild)
    assert acquire() is not None and gsplice.stats().acquired_new == 2
fork(child)
assert inode(acquire()) == first
"""
    )


def test_a_handler_before_ours_that_wants_a_pipe() -> None:
    """It may run another greenlet, or let one run; what that gets is its own, and stays so."""
    run_program(
        """
import os
got = []
def want():
    got.append(pipes.acquire())
    got.append(pipes.acquire())
    pipes.release(got[1])
os.register_at_fork(after_in_child=want)
"""
        + FORKS["os.fork"]
        + """
lent = [acquire() for _ in range(3)]
mine = {inode(pipe) for pipe in lent}
last = inode(lent[-1])
while lent:
    release(lent.pop(0))
def child():
    assert got[0].read_fd >= 0 and inode(got[0]) not in mine
    assert not mine & open_inodes()
    assert acquire() is got[1] and inode(got[1]) != inode(got[0])
    figures = gsplice.stats()
    assert (figures.pipes_in_use, figures.pipes_idle) == (2, 0), figures
for _ in range(2):
    fork(child)
assert gsplice.stats().pipes_idle == 3
assert inode(acquire()) == last
"""
    )


def test_a_pipe_that_another_thread_is_making_does_not_count_in_the_child() -> None:
    run_program(
        FORKS["os.fork"]
        + """
key = next(keys)
assert reserve(key, 9)
def child():
    assert gsplice.stats().pipes_in_use == 0
    assert None not in [acquire() for _ in range(5)]
fork(child)
assert alive.pop(key) is None
""",
        GSPLICE_MAX_PIPES=5,
    )


@pytest.mark.parametrize("lock", ["lending._lock", "counters._lock"])
def test_forking_while_another_thread_holds_a_lock(lock: str) -> None:
    run_program(
        "import faulthandler; faulthandler.dump_traceback_later(30, exit=True)\n"
        + FORKS["os.fork"]
        + f"""
release(acquire())
def child():
    release(acquire())
    pipe = acquire()
    pipe.pending = pipes.UNKNOWN
    release(pipe)
    counters.fell_back('test')
    figures = gsplice.stats()
    assert figures.pipes_created == figures.pipes_closed + figures.pipes_in_use + figures.pipes_idle
failed = []
def other():
    try:
        fork(child)
    except BaseException as err:
        failed.append(err)
with {lock}:
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
assert not failed, failed
assert gsplice.stats().acquired_new == 1
"""
    )


def test_forking_in_threads_that_use_the_pool_all_the_time() -> None:
    run_program(
        "import faulthandler; faulthandler.dump_traceback_later(60, exit=True)\n"
        + FORKS["os.fork"]
        + """
going = True
def use():
    while going:
        lent = [acquire() for _ in range(3)]
        for pipe in lent:
            os.write(pipe.write_fd, b'%d' % inode(pipe))
        for pipe in lent:
            assert os.read(pipe.read_fd, 20) == b'%d' % inode(pipe)
        while lent:
            release(lent.pop())
        gc.collect(0)
        pipe = None
failed = []
def keep_using():
    try:
        use()
    except BaseException as err:
        failed.append(err)
        raise
threads = [threading.Thread(target=keep_using) for _ in range(2)]
for thread in threads: thread.start()
def child():
    lent = [acquire() for _ in range(5)]
    assert None not in lent
    figures = gsplice.stats()
    assert figures.pipes_in_use == 5, figures
    while lent:
        release(lent.pop())
    os._exit(0)
try:
    for _ in range(40):
        fork(child)
finally:
    going = False
    for thread in threads: thread.join()
assert not failed
figures = gsplice.stats()
assert figures.pipes_in_use == 0
assert figures.pipes_created == figures.pipes_closed + figures.pipes_idle
""",
        GSPLICE_MAX_IDLE_HUB=1,
        GSPLICE_MAX_IDLE=1,
    )


# Transfers that are under way at the fork

#: The parent starts a transfer, forks when it waits, and goes on with it after, or while, the child
#: finds out what has become of the transfer there.
INHERIT = """
import json, os, stat, sys, gevent, gevent.os, gevent.socket, gsplice
from gevent.fileobject import FileObject
transfer, first, given, taken, path, fed = sys.argv[1:]
gsplice.patch_all()

def endpoint(fd):
    if stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
        return gevent.socket.socket(fileno=int(fd))
    return int(fd)

src, dst = endpoint(given), endpoint(taken)
if transfer == 'copyfileobj':
    source, sink = src.makefile('rb', 0), dst.makefile('wb', 0)
    run = lambda: gsplice.copyfileobj(source, sink)
elif transfer == 'copyfileobj, buffered':
    source, sink = src.makefile('rb'), dst.makefile('wb')
    run = lambda: gsplice.copyfileobj(source, sink)
elif transfer == 'copy':
    run = lambda: gsplice.copy(src, dst)
elif transfer == 'pipe to socket':
    source, sink = FileObject(src, 'rb', 0), dst.makefile('wb', 0)
    run = lambda: gsplice.copyfileobj(source, sink)
elif transfer == 'socket to pipe':
    source, sink = src.makefile('rb', 0), FileObject(dst, 'wb', 0)
    run = lambda: gsplice.copyfileobj(source, sink)
else:
    source = open(path, 'rb')
    if 'after much else' in transfer:  # the socket has no room when the transfer starts
        while True:
            try:
                dst._sock.send(bytes(4096))
            except BlockingIOError:
                break
    if transfer == '_sendfile_use_sendfile':
        run = lambda: dst._sendfile_use_sendfile(source)
    elif transfer.startswith('copy of a'):
        run = lambda: gsplice.copy(source, dst)
    else:
        run = lambda: dst.sendfile(source)

def is_waiting():
    end, what = (dst, 'write') if fed == 'None' else (src, 'read')
    if isinstance(end, int):
        watcher = getattr((sink if what == 'write' else source).io, f'_{what}_watcher')
    else:
        watcher = getattr(end, f'_{what}_event')
    return watcher is not None and watcher.active

def moved():
    figures = gsplice.stats().as_dict()
    return sum(number for name, number in figures.items() if name.startswith('bytes_'))

greenlet = gevent.spawn(run)
with gevent.Timeout(30):
    while not is_waiting():
        gevent.sleep(0.001)
figures = gsplice.stats()
before = moved()
pid = gevent.os.fork_gevent()  # without a watcher, so that the child is ours to wait for
if pid == 0:
    error = None
    try:
        with gevent.Timeout(30):
            greenlet.join()
        error = getattr(greenlet.exception, 'errno', repr(greenlet.exception))
    except BaseException as err:
        error = repr(err)
    os.write(1, json.dumps({'who': 'child', 'error': error, 'moved': moved() - before,
                            'in_use': gsplice.stats().pipes_in_use}).encode() + b'\\n')
    os._exit(0)
os.write(1, b'"forked"\\n')
if first == 'child':
    assert os.waitpid(pid, 0)[1] == 0
with gevent.Timeout(60):
    greenlet.get()
if first == 'both':
    assert os.waitpid(pid, 0)[1] == 0
os.write(1, json.dumps({'who': 'parent', 'moved': moved(), 'in_use_then': figures.pipes_in_use,
                        'in_use': gsplice.stats().pipes_in_use,
                        'fallbacks': gsplice.stats().as_dict()['fallbacks']}).encode() + b'\\n')
for end in src, dst:
    if hasattr(end, 'shutdown'):
        end.close()
os._exit(0)
"""


def connection() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
    return client.detach(), server.detach()


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.close(fd)


def read_all(fd: int) -> bytes:
    """Read until the end from *fd*, and close it."""
    with open(fd, "rb") as file:
        return file.read()


def inherit(transfer: str, first: str, data: bytes, before: int | None, path: Path) -> Any:
    """Have a transfer of *data* forked; return what arrived, and what child and parent say of it.

    The transfer gets *before* bytes until it waits for more, and the rest after the fork; or all,
    and waits because nobody reads before the fork.
    """
    feed, given = reversed(os.pipe()) if transfer == "pipe to socket" else connection()
    sink, taken = os.pipe() if transfer == "socket to pipe" else connection()
    path.write_bytes(data)
    if "file" in transfer and "obj" not in transfer:
        data = b""  # for the feeder
    with ended_with(
        [
            sys.executable,
            "-c",
            INHERIT,
            transfer,
            first,
            str(given),
            str(taken),
            str(path),
            str(before),
        ],
        pass_fds=(given, taken),
    ) as process:
        os.close(given)
        os.close(taken)
        assert process.stdout is not None
        if before is None:
            rest = data
        else:
            os.write(feed, data[:before])
            rest = data[before:]
        feeder = threading.Thread(target=write_all, args=(feed, rest))
        if before is None:
            feeder.start()
        first_line = process.stdout.readline()
        assert first_line == b'"forked"\n'
        if before is not None:
            feeder.start()
        arrived = read_all(sink)
        reports = {line["who"]: line for line in map(json.loads, process.stdout)}
        feeder.join()
    assert process.returncode == 0, reports
    return arrived, reports["child"], reports["parent"]


BIG = some_bytes(6 * MiB)
SMALL = some_bytes(60_000)


@pytest.mark.few(6)
@pytest.mark.parametrize("first", ["child", "both", "both", "both"])
@pytest.mark.parametrize(
    ("transfer", "before", "data"),
    [
        ("copyfileobj", None, BIG),
        ("copyfileobj", 0, BIG),
        ("copyfileobj", 100_000, BIG),
        ("copyfileobj, buffered", None, BIG),
        ("copyfileobj, buffered", 0, BIG),
        ("copyfileobj, buffered", 100_000, BIG),
        ("copy", None, BIG),
        ("copy", 0, BIG),
        ("pipe to socket", None, BIG),
        ("pipe to socket", 0, BIG),
        ("socket to pipe", None, BIG),
        ("socket to pipe", 0, BIG),
        ("sendfile", None, BIG),
        ("_sendfile_use_sendfile", None, BIG),
        ("copy of a file", None, BIG),
        ("sendfile, after much else", None, SMALL),
        ("copy of a small file, after much else", None, SMALL),
    ],
)
def test_a_transfer_under_way_ends_in_the_child_and_goes_on_in_the_parent(
    transfer: str, before: int | None, data: bytes, first: str, tmp_path: Path
) -> None:
    arrived, child, parent = inherit(transfer, first, data, before, tmp_path / "file")
    assert child["error"] == errno.ECANCELED
    assert (child["moved"], child["in_use"]) == (0, 0)
    if "after much else" in transfer:
        arrived = arrived.lstrip(b"\0")
    assert digest(arrived) == digest(data)
    assert parent["in_use"] == 0
    if "small" not in transfer:
        assert parent["moved"] == len(data)
    waited_with_bytes_in_a_pipe = (
        before is None and transfer.startswith("copy") and "of a" not in transfer
    )
    assert parent["in_use_then"] == waited_with_bytes_in_a_pipe
