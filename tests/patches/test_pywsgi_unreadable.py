"""What an application wraps, and nobody can read: the same error from pywsgi, for HEAD, too."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from conftest import file_of
from wsgi import request, split


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(5, "Input/output error")


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["file", "raw", "memory", "broken"])
@pytest.mark.parametrize("declared", [(), (("Content-Length", "10"),)])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_what_can_not_be_read_is_an_error_for_head_too(
    serve: Any, tmp_path: Path, quiet: None, kind: str, declared: Any, method: str
) -> None:
    path = file_of(tmp_path / "f", 100_000)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", list(declared))
        if kind == "broken":
            return environ["wsgi.file_wrapper"](Broken(b"x" * 10))
        file: Any = io.BytesIO(b"x" * 10)
        if kind != "memory":
            file = path.open("rb", buffering=0 if kind == "raw" else -1)
        file.close()
        return environ["wsgi.file_wrapper"](file)

    def read_by_pywsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        yield from app(environ | {"wsgi.file_wrapper": FileWrapper}, start_response)

    def answer(which: Any) -> str:
        return split(serve(which).ask(request(method)))[0]

    assert answer(app) == answer(read_by_pywsgi) == "HTTP/1.1 500 Internal Server Error"
