"""The pages that people look at: a listing, an error, the figures. Nothing is loaded for them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import stat
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

WSGIEnviron = dict[str, Any]

_DIRECTORY: Final = Path(__file__).with_name("templates")
_TEMPLATES: Final = Environment(
    loader=FileSystemLoader(_DIRECTORY), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def _inline(name: str) -> tuple[Markup, str]:
    """Return what a page has inside of itself, and the source that its policy allows it by."""
    text = (_DIRECTORY / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


_STYLE, _STYLE_SOURCE = _inline("style.css")
_SCRIPT, _SCRIPT_SOURCE = _inline("figures.js")

#: Our own pages load nothing; a file's name that got past the escaping could not run anything.
_PAGE_POLICY: Final = (
    f"default-src 'none'; style-src {_STYLE_SOURCE}; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FIGURES_POLICY: Final = f"{_PAGE_POLICY}; script-src {_SCRIPT_SOURCE}; connect-src 'self'"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    name: str
    href: str
    is_dir: bool
    size: int
    seconds: float
    modified: datetime | None


#: What can be sorted by: the heading, the key, the order that the first click asks for.
COLUMNS: dict[str, tuple[str, Callable[[Entry], Any], str]] = {
    "name": ("Name", lambda entry: entry.name.casefold(), "asc"),
    "size": ("Size", lambda entry: entry.size, "desc"),
    "time": ("Modified", lambda entry: entry.seconds, "desc"),
}


def entry(name: str, status: os.stat_result) -> Entry:
    """Return the line for the file or directory *name*."""
    is_dir = stat.S_ISDIR(status.st_mode)
    return Entry(
        name=shown(name),
        href=quote(os.fsencode(name), safe="") + ("/" if is_dir else ""),
        is_dir=is_dir,
        size=0 if is_dir else status.st_size,
        seconds=status.st_mtime,
        modified=moment(status.st_mtime),
    )


def shown(name: str) -> str:
    """Return a name for people: bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def moment(seconds: float) -> datetime | None:
    """Return a time in UTC; None if a file can have it and the calendar, there or here, cannot."""
    try:
        result = datetime.fromtimestamp(seconds, timezone.utc)
        result.astimezone()  # as listings will
        return result
    except (OverflowError, ValueError, OSError):
        return None


def headings(sort: str, order: str) -> list[dict[str, str | None]]:
    """Return the headings of a listing that is sorted in that way, with where they lead."""
    result = []
    for name, (label, _, first_order) in COLUMNS.items():
        current = order if name == sort else None
        next_order = {None: first_order, "asc": "desc", "desc": "asc"}[current]
        aria = {None: None, "asc": "ascending", "desc": "descending"}[current]
        href = f"?sort={name}&order={next_order}"
        result.append({"name": name, "label": label, "href": href, "aria": aria})
    return result


def page(template: str, policy: str = _PAGE_POLICY, **values: Any) -> Response:
    """Return a page made of *template*, which may do no more than *policy* allows."""
    text = _TEMPLATES.get_template(template).render(values, style=_STYLE)
    response = Response(text, mimetype="text/html")
    response.headers["Content-Security-Policy"] = policy
    return response


def figures_page(environ: WSGIEnviron, workers: int) -> Response:
    """Return the page of ``/.stats``, which asks for the figures itself."""
    patched = "wsgi.file_wrapper" in environ
    return page("figures.html", _FIGURES_POLICY, patched=patched, workers=workers, script=_SCRIPT)


def error_page(error: HTTPException, environ: WSGIEnviron) -> Response:
    """Return the answer to a request that went wrong."""
    home = quote(environ.get("SCRIPT_NAME", "").encode("latin-1")) + "/"
    response = page("error.html", error=error, home=home)
    response.status_code = error.code or 500
    for name, value in error.get_headers(environ):
        if name != "Content-Type":
            response.headers[name] = value
    return response
