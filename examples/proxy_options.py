"""The command line that tcp_proxy.py and http_connect_proxy.py have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

Address = tuple[str, int]

HOST_AND_PORT = re.compile(r"(?:\[([^\s\[\]]+)\]|([^\s:\[\]]+)):([0-9]{1,5})")


def add_options(parser: argparse.ArgumentParser, listen_on: str) -> None:
    def add(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        metavar = {seconds: "SECONDS", positive: "N", host_and_port: "HOST:PORT"}[kind]
        text += "; default: %(default)s"
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    add("--listen", host_and_port, listen_on, "where; port 0 is any free one")
    add("--max-connections", positive, 1000, "of a worker; more are refused")
    add("--connect-timeout", seconds, 10, "for the way to a backend; 0 is for ever")
    add("--idle-timeout", seconds, 600, "end a connection on which nothing moves; 0 is never")
    add("--grace", seconds, 10, "for what is under way when SIGINT or SIGTERM comes")
    add("--workers", positive, 1, "processes that share the port, one for a core")


def host_and_port(text: str) -> Address:
    """Parse HOST:PORT; an IPv6 address is in brackets, as in a URL."""
    match = HOST_AND_PORT.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, or [IPV6]:PORT")
    host = match[1] or match[2]
    try:
        host.encode("idna")  # as getaddrinfo() does
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{host!r} is no name of a host: {error}") from None
    return host, int(match[3])


def shown(address: Address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 up")
    return number


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return number
