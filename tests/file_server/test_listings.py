"""Listings of directories."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from example_file_server import (
    HOSTILE,
    TEXT,
    Listing,
    Server,
    serving,
)


def test_listing(server: Server) -> None:
    listing = Listing(server.get("/"))
    assert listing.names == [
        "\\evil.example/",
        "inside-directory/",
        "sub/",
        HOSTILE,
        ".hidden",
        "absolute-inside-link",
        "archive.tar.gz",
        "big.bin",
        "data:,x.html",
        "Empty.dat",
        "inside-link",
        "latin\N{REPLACEMENT CHARACTER}.txt",
        "page.html",
        "text.txt",
        "unknown.qqq",
    ]
    assert listing.sizes["big.bin"] == "3,200,000 bytes"
    assert listing.sizes["Empty.dat"] == "0 bytes"
    assert "sub/" not in listing.sizes
    assert listing.times["text.txt"] == "2017-07-14T02:40:01+00:00"
    assert "script" not in listing.tags


def test_every_link_of_a_listing_leads_to_its_file(server: Server, root: Path) -> None:
    for href, text in Listing(server.get("/")).rows:
        assert re.fullmatch(r"[A-Za-z0-9._~%/-]+", href), href
        answer = server.get("/" + href)
        assert answer.status == 200, text
        if not href.endswith("/"):
            path = os.path.join(os.fsencode(root), unquote_to_bytes(href))
            assert answer.body == Path(os.fsdecode(path)).read_bytes(), text


def test_names_are_escaped(server: Server) -> None:
    body = server.get("/").body
    assert b"<script" not in body
    assert b"&lt;script&gt;alert(1)&lt;b&gt;" in body
    assert b"latin%E9.txt" in body
    policy = server.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@pytest.mark.parametrize(
    ("query", "first", "last", "heading", "aria"),
    [
        ("?sort=name&order=desc", "unknown.qqq", HOSTILE, "Name", "descending"),
        ("?sort=size", "big.bin", "Empty.dat", "Size", "descending"),
        ("?sort=size&order=asc", "Empty.dat", "big.bin", "Size", "ascending"),
        ("?sort=time&order=asc", "page.html", None, "Modified", "ascending"),
        ("?sort=nonsense&order=%3Cscript%3E", HOSTILE, "unknown.qqq", "Name", "ascending"),
    ],
)
def test_sorting(
    server: Server, query: str, first: str, last: str | None, heading: str, aria: str
) -> None:
    listing = Listing(server.get("/" + query))
    directories = [name for name in listing.names if name.endswith("/")]
    assert listing.names[: len(directories)] == directories, "directories come first"
    files = listing.names[len(directories) :]
    assert files[0] == first
    assert last is None or files[-1] == last
    assert listing.aria == {"Name": "", "Size": "", "Modified": "", heading: aria}


def test_sort_links_turn_the_order_round(server: Server) -> None:
    hrefs = {text: href for href, text in Listing(server.get("/?sort=time&order=desc")).links}
    assert hrefs["Modified"] == "?sort=time&order=asc"
    assert hrefs["Size"] == "?sort=size&order=desc"
    assert hrefs["Name"] == "?sort=name&order=asc"


def test_breadcrumbs(server: Server) -> None:
    links = Listing(server.get("/sub/deeper/")).links
    assert links[:2] == [("../../", "root"), ("../", "sub")]
    assert ("../", "..") in links
    assert links[-1] == ("../../.stats", "Live figures")
    assert server.get("/sub/deeper/").body.count(b"Nothing here.") == 1


@pytest.mark.parametrize(
    ("zone", "seconds"), [("XXX10", -62_135_596_800), ("YYY-10", 253_402_300_799)]
)
def test_listing_with_a_time_the_zone_does_not_have(
    monkeypatch: pytest.MonkeyPatch, zone: str, seconds: int
) -> None:
    """The first and the last second of the calendar, in UTC: elsewhere, they are outside it."""
    monkeypatch.setenv("TZ", zone)
    # Not every file system can keep such times; that of /dev/shm can.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        for path in (Path(name, "strange"), Path(name, "usual")):
            path.write_bytes(TEXT)
        os.utime(Path(name, "strange"), (seconds, seconds))
        assert Path(name, "strange").stat().st_mtime == seconds
        with serving(Path(name), "--no-patch") as server:
            listing = Listing(server.get("/"))
            assert listing.names == ["strange", "usual"]
            assert list(listing.times) == ["usual"]
            assert server.get("/strange").body == TEXT


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/sub", "/sub/"),
        ("/sub?sort=size&order=asc", "/sub/?sort=size&order=asc"),
        ("/sub?q=%3Cb%3E%0d%0aX:%201", "/sub/?q=%3Cb%3E%0d%0aX:%201"),
        ("/sub%2fdeeper", "/sub/deeper/"),
        ("/inside-directory", "/inside-directory/"),
        ("/%5cevil.example", "/%5Cevil.example/"),
        ("/\\evil.example", "/%5Cevil.example/"),
        ("http://evil.example/sub?sort=size", "/sub/?sort=size"),
    ],
)
def test_directory_without_slash_redirects(server: Server, target: str, location: str) -> None:
    answer = server.raw_get(target.encode())
    assert answer.status in (301, 308)
    assert answer.headers["Location"] == location


@pytest.mark.few
@pytest.mark.parametrize(
    "target",
    [
        *(b"//sub", b"/%2fsub", b"//evil.example/%2e%2e", b"//evil.example/..", b"/sub//deeper"),
        *(b"http://x//sub", b"http://x/%2fsub", b"http:///sub", b"http:%2f%2f%2fsub"),
    ],
)
def test_two_slashes_never_redirect(server: Server, target: bytes) -> None:
    answer = server.raw_get(target)
    assert answer.status == 404
    assert "Location" not in answer.headers
