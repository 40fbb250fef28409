"""The command: its arguments, its sockets, and its server."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

import gevent
import gevent.os
import gevent.socket
from gevent.monkey import get_original
from gevent.pywsgi import WSGIHandler, WSGIServer

import gsplice

from .app import WSGIApp, make_app
from .figures import Figures
from .pages import shown
from .prefork import prefork

#: A socket of gevent's makes a hub, which must not be there before the workers are forked.
_Socket: Final[type[socket.socket]] = get_original("socket", "socket")

_BACKLOG: Final = 256  # as pywsgi's own


class Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types
    """pywsgi's, with an end to its patience: each of these has to be read within ``timeout``."""

    server: Server
    timeout: float | None = None

    def read_requestline(self) -> str:
        """As if the connection had been lost, it is closed without a word."""
        with gevent.Timeout(self.timeout, TimeoutError):
            line: str = super().read_requestline()
            return line

    def read_request(self, raw_requestline: str) -> bool:
        """As if the headers were wrong: 400."""
        with gevent.Timeout(self.timeout, ValueError("the headers took too long")):
            valid: bool = super().read_request(raw_requestline)
            return valid

    def process_result(self) -> None:
        """Count it as under way, and send it."""
        with self.server.figures.response():
            super().process_result()


class Server(WSGIServer):  # type: ignore[misc]
    """pywsgi's, with the figures for its page, stopped by signals."""

    handler_class = Handler

    def __init__(self, listener: socket.socket, app: WSGIApp, figures: Figures, log: Any) -> None:
        super().__init__(gevent.socket.socket(fileno=listener.detach()), app, log=log)
        self.figures = figures

    def run(
        self, worker: int = 0, lifeline: int | None = None, begun: Callable[[], None] = lambda: None
    ) -> int:
        """Serve until SIGINT or SIGTERM comes, or the process at *lifeline*'s other end is gone.

        Calls *begun* when it can be stopped by a signal.
        """
        self.start()  # before it can be stopped, which a server that has not been started can't
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self.stop)
        if lifeline is not None:
            gevent.spawn(self._stop_at_the_end_of, lifeline)
        self.figures.begin(worker)
        begun()
        self.serve_forever()
        return 0

    def _stop_at_the_end_of(self, lifeline: int) -> None:
        gevent.os.make_nonblocking(lifeline)
        gevent.os.nb_read(lifeline, 1)
        self.stop()


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Serve what *argv* says until SIGINT or SIGTERM comes; return the exit code.

    On entry ``gevent.monkey.patch_all()`` has been called, and there is no hub. Ends with exit code
    2 for wrong arguments.
    """
    arguments = _parse(argv, prog)
    patched = "patched: nothing (--no-patch)" if arguments.no_patch else gsplice.patch_all()
    if arguments.header_timeout > 0:
        Handler.timeout = arguments.header_timeout
    try:
        listeners = _listen(arguments.host, arguments.port, arguments.workers)
    except OSError as error:
        print(f"cannot listen on {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return 1
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{listeners[0].getsockname()[1]}/"

    def say_so() -> None:
        print(f"Serving {shown(arguments.directory)} at {address} (Ctrl-C to stop)")
        print(f"gsplice {patched}", flush=True)

    figures = Figures(arguments.workers)
    app = make_app(arguments.directory, arguments.follow_symlinks, figures)
    log = "default" if arguments.access_log else None

    if arguments.workers == 1:
        return Server(listeners[0], app, figures, log).run(begun=say_so)

    def work(worker: int, lifeline: int) -> int:
        mine = listeners[worker].dup()  # the parent's stays, for a worker that follows
        for listener in listeners:
            listener.close()
        return Server(mine, app, figures, log).run(worker, lifeline)

    return prefork(arguments.workers, work, say_so)


def _listen(host: str, port: int, number: int) -> list[socket.socket]:
    """Return *number* sockets that listen on the same port, among which the kernel shares out.

    The process that forks the workers keeps them open, so nothing that has come in for a worker
    that dies is lost (SO_REUSEPORT in socket(7)). Raises OSError.
    """
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    first = _bound(family, host, port)
    first.listen(_BACKLOG)
    if number == 1:
        return [first]
    # It has found a port that is nobody else's, which the option would have let it share.
    port = first.getsockname()[1]
    first.close()
    listeners = [_bound(family, host, port, socket.SO_REUSEPORT) for _ in range(number)]
    for listener in listeners:
        listener.listen(_BACKLOG)
    return listeners


def _bound(family: int, host: str, port: int, *options: int) -> socket.socket:
    sock = _Socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _parse(argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description="Serve the files of a directory over HTTP.")
    parser.add_argument("directory", metavar="DIR", nargs="?", default=".", help="default: .")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=1,
        help="processes that share the port, one for a core; default: %(default)s",
    )
    parser.add_argument("--no-patch", action="store_true", help="plain gevent, to compare with")
    parser.add_argument("--access-log", action="store_true", help="a line for each request")
    parser.add_argument(
        "--follow-symlinks", action="store_true", help="serve what symlinks out of DIR lead to"
    )
    parser.add_argument(
        "--header-timeout",
        metavar="SECONDS",
        type=float,
        default=60,
        help="close a connection on which no request, or only the start of one, comes for so long; "
        "default: %(default)s; 0: never",
    )
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.directory):
        parser.error(f"{arguments.directory} is not a directory")
    if not 1 <= arguments.workers <= 256:
        parser.error(f"--workers must be from 1 to 256, not {arguments.workers}")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, not {arguments.port}")
    if not 0 <= arguments.header_timeout < math.inf:
        parser.error(f"--header-timeout must be seconds from 0 up, not {arguments.header_timeout}")
    return arguments
