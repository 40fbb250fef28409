"""Several processes that serve one port, for the two proxies of these examples."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time

#: What a worker is told by its parent. They are blocked while there is nobody to deal with them.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}

PR_SET_PDEATHSIG = 1  # prctl(2)


def listen(address: tuple[str, int], number: int) -> list[socket.socket]:
    """Return *number* sockets that listen there; the kernel shares out the connections."""
    ipv6 = ":" in address[0]
    kind = {
        "family": socket.AF_INET6 if ipv6 else socket.AF_INET,
        "dualstack_ipv6": address[0] == "::",
        "backlog": 1024,
    }
    listeners = [socket.create_server(address, **kind)]
    if number > 1:
        # The port was nobody's. With SO_REUSEPORT (socket(7)) alone, we might have had to share it.
        address = listeners[0].getsockname()
        listeners[0].close()
        listeners = [socket.create_server(address, **kind, reuse_port=True) for _ in range(number)]
    for listener in listeners:
        listener.setblocking(False)
    return listeners


def prefork(listeners: list[socket.socket]) -> socket.socket | None:
    """Fork a worker for each of *listeners* and return it there; None here, when all have ended.

    Passes signals on. A worker that dies is replaced, and its socket keeps what has come in for it.
    On entry SIGNALS and SIGCHLD are blocked, and there is no hub: workers must not share one.
    """
    workers: dict[int, socket.socket] = {}
    while listeners or workers:
        for listener in listeners:
            if listener in workers.values():
                continue
            parent = os.getpid()
            process = os.fork()
            if not process:
                _be_worker(listener, listeners, parent)
                return listener
            workers[process] = listener
        number = signal.sigwait(SIGNALS | {signal.SIGCHLD})
        if number == signal.SIGCHLD:
            _forget_dead(workers, replaced=bool(listeners))
            continue
        if number != signal.SIGUSR1:
            while listeners:  # nobody may connect to a worker that is about to end
                listeners.pop().close()
        for process in workers:
            os.kill(process, number)
    return None


def _be_worker(listener: socket.socket, listeners: list[socket.socket], parent: int) -> None:
    os.setpgrp()  # Ctrl-C is for the parent to pass on, once
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # none is left when it is killed
    if os.getppid() != parent:  # before that
        os._exit(1)
    for other in listeners:
        if other is not listener:
            other.close()


def _forget_dead(workers: dict[int, socket.socket], replaced: bool) -> None:
    before = len(workers)
    while workers:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            break
        del workers[process]
        if replaced:
            code = os.waitstatus_to_exitcode(status)
            print(f"Worker {process} has ended ({code}); another one follows", file=sys.stderr)
    if replaced and len(workers) < before:
        time.sleep(1)  # they may be ending as soon as they start
