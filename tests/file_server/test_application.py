"""The application without the server."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_file_server import (
    BIG,
    SECRET,
    TEXT,
    open_files,
)

from gsplice.file_server import make_app
from gsplice.file_server.pages import moment


class Wrapper:
    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self.file = file


def call(
    app: Callable[..., Any], path: str, **environ: Any
) -> tuple[Any, str, list[tuple[str, str]]]:
    started: list[Any] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        **environ,
    }
    result = app(environ, lambda status, headers, exc_info=None: started.extend((status, headers)))
    return (result, *started)


def test_the_wrapped_file_itself_is_the_result(root: Path) -> None:
    app = make_app(root)
    for headers, start in (({}, 0), ({"HTTP_RANGE": "bytes=70000-80000"}, 70_000)):
        result, _, _ = call(app, "/big.bin", **headers, **{"wsgi.file_wrapper": Wrapper})
        assert type(result) is Wrapper
        assert type(result.file) is io.BufferedReader
        assert type(result.file.raw) is io.FileIO
        assert result.file.tell() == start
        result.file.close()


@pytest.mark.parametrize(
    ("path", "environ"),
    [
        ("/big.bin", {}),
        ("/big.bin", {"HTTP_RANGE": "bytes=0-9"}),
        ("/big.bin", {"HTTP_RANGE": "bytes=99999999-"}),
        ("/big.bin", {"HTTP_IF_NONE_MATCH": "*"}),
        ("/big.bin", {"HTTP_IF_MATCH": '"other"'}),
        ("/big.bin", {"REQUEST_METHOD": "HEAD"}),
        ("/big.bin/", {}),
        ("/sub", {}),
        ("/", {}),
        ("/outside-link", {}),
        ("/fifo", {}),
    ],
)
def test_no_file_stays_open(root: Path, path: str, environ: dict[str, str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, _, _ = call(make_app(root), path, **environ)
        with contextlib.suppress(AttributeError):
            result.close()  # without having read it: the client went away
    assert open_files(root.parent) == []
    # Nor was it closed only because nobody held it any more.
    assert [str(warning.message) for warning in caught] == []
    assert result is not None


def test_pieces_of_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BIG)
    result, status, _ = call(make_app(tmp_path), "/file")
    assert status == "200 OK"
    os.truncate(tmp_path / "file", 100_000)
    received = 0
    with contextlib.closing(result), pytest.raises(ConnectionResetError):
        for piece in result:
            received += len(piece)
    assert received == 100_000


def test_file_that_grows_is_cut_at_its_announced_length(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    result, _, headers = call(make_app(tmp_path), "/file")
    with open(tmp_path / "file", "ab") as file:
        file.write(BIG)
    with contextlib.closing(result):
        assert b"".join(result) == TEXT
    assert dict(headers)["Content-Length"] == str(len(TEXT))


def test_what_was_checked_is_what_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (root / "file").write_bytes(TEXT)

    def readlink_then_exchange(path: str) -> str:
        real = os_readlink(path)
        (root / "file").unlink()
        (root / "file").symlink_to(tmp_path / "secret")
        return real

    os_readlink = os.readlink
    app = make_app(root)
    monkeypatch.setattr(os, "readlink", readlink_then_exchange)
    result, status, _ = call(app, "/file")
    monkeypatch.undo()
    with contextlib.closing(result):
        assert status == "200 OK"
        assert b"".join(result) == TEXT
    assert call(app, "/file")[1] == "404 NOT FOUND"


def test_a_time_no_calendar_has() -> None:
    assert moment(1e18) is None
    assert moment(-1.5) is not None
