"""Ranges, and requests with conditions."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from example_file_server import (
    BIG,
    TEXT,
    Server,
    serving,
)


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99999", 0, 100_000),
        ("bytes=1000001-2000000", 1_000_001, 2_000_001),
        ("bytes=3000000-", 3_000_000, len(BIG)),
        ("bytes=-100000", len(BIG) - 100_000, len(BIG)),
        ("bytes=-99999999", 0, len(BIG)),
        ("bytes=3199999-99999999", len(BIG) - 1, len(BIG)),
    ],
)
def test_range(server: Server, wanted: str, start: int, stop: int) -> None:
    answer = server.get("/big.bin", Range=wanted)
    assert answer.status == 206
    assert answer.body == BIG[start:stop]
    assert answer.headers["Content-Length"] == str(stop - start)
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(BIG)}"


@pytest.mark.parametrize(
    "wanted",
    ["bytes=100-", "bytes=100-200", "bytes=99999999999999999999-", "bytes=-0", "Bytes=-00"],
)
def test_range_without_any_byte_is_416(server: Server, wanted: str) -> None:
    answer = server.get("/text.txt", Range=wanted)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == "bytes */100"
    assert TEXT not in answer.body


@pytest.mark.few
@pytest.mark.parametrize(
    "wanted",
    [
        *("bytes=0-1,4-5", "bytes=-0,4-5", "bytes=5-2", "bytes=a-b"),
        *("lines=0-1", "lines=-0", "bytes=-", "bytes=", "x"),
    ],
)
def test_several_or_senseless_ranges_give_the_whole_file(server: Server, wanted: str) -> None:
    answer = server.get("/text.txt", Range=wanted)
    assert (answer.status, answer.body) == (200, TEXT)
    assert "Content-Range" not in answer.headers


def test_range_is_for_get_only(server: Server) -> None:
    answer = server.get("/text.txt", method="HEAD", Range="bytes=0-4")
    assert answer.status == 200
    assert answer.headers["Content-Length"] == "100"


def test_not_modified(server: Server) -> None:
    first = server.get("/text.txt")
    etag, date = first.headers["ETag"], first.headers["Last-Modified"]
    assert re.fullmatch(r'"[^"]+"', etag)
    assert date == "Fri, 14 Jul 2017 02:40:01 GMT"
    for headers in (
        {"If_None_Match": etag},
        {"If_None_Match": f'"other", W/{etag}'},
        {"If_None_Match": "*"},
        {"If_None_Match": etag, "Range": "bytes=0-4"},
        {"If_Modified_Since": date},
        {"If_Modified_Since": "Fri, 14 Jul 2023 02:40:00 GMT"},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (304, b""), headers
        assert answer.headers["ETag"] == etag
    for headers in (
        {"If_None_Match": '"other"'},
        {"If_None_Match": '"other"', "If_Modified_Since": date},
        {"If_Modified_Since": "Fri, 14 Jul 2017 02:40:00 GMT"},
        {"If_Modified_Since": "no date"},
        {"If_Match": etag},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (200, TEXT), headers


def test_if_match_of_another_version_is_412(server: Server) -> None:
    answer = server.get("/text.txt", If_Match='"other"')
    assert answer.status == 412
    assert TEXT not in answer.body


def test_if_match_of_this_version_changes_nothing(server: Server) -> None:
    etag = server.get("/text.txt").headers["ETag"]
    for match in ("*", etag, f'"other", {etag}'):
        answer = server.get("/text.txt", If_Match=match)
        assert (answer.status, answer.body) == (200, TEXT), match
        answer = server.get("/text.txt", If_Match=match, Range="bytes=1-3", If_Range=etag)
        assert (answer.status, answer.body) == (206, b"123"), match
        answer = server.get("/text.txt", If_Match=match, If_None_Match=etag)
        assert (answer.status, answer.body) == (304, b""), match
    assert server.get("/text.txt", If_Match=f"W/{etag}").status == 412, "weak ones never match"
    assert server.get("/nope", If_Match="*").status == 404


def test_if_unmodified_since(server: Server) -> None:
    first = server.get("/text.txt")
    etag, date = first.headers["ETag"], first.headers["Last-Modified"]
    old = "Fri, 14 Jul 2017 02:40:00 GMT"
    for headers in (
        {"If_Unmodified_Since": date},
        {"If_Unmodified_Since": "Fri, 14 Jul 2023 02:40:00 GMT"},
        {"If_Unmodified_Since": "no date"},
        {"If_Unmodified_Since": old, "If_Match": etag},
        {"If_Unmodified_Since": old, "If_Match": "*"},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (200, TEXT), headers
    for headers in (
        {"If_Unmodified_Since": old},
        {"If_Unmodified_Since": old, "If_None_Match": etag},
        {"If_Unmodified_Since": old, "Range": "bytes=1-3"},
        {"If_Unmodified_Since": date, "If_Match": '"other"'},
        {"If_Unmodified_Since": old, "method": "HEAD"},
    ):
        answer = server.get("/text.txt", **headers)
        assert answer.status == 412, headers
        assert TEXT not in answer.body


@pytest.mark.parametrize("name", ["If_Modified_Since", "If_Unmodified_Since", "If_Range"])
def test_dates_no_calendar_has_are_ignored(server: Server, name: str) -> None:
    for date in (
        "Fri, 14 Jul 99999999999999999999 02:40:00 GMT",
        "Fri, 14 Jul 2017 02:40:00 +99999999999999",
    ):
        answer = server.get("/text.txt", Range="bytes=1-3", **{name: date})
        expected = (200, TEXT) if name == "If_Range" else (206, b"123")
        assert (answer.status, answer.body) == expected, date


def test_etag_changes_with_the_content(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1_500_000_000, 1_500_000_000))

    with serving(tmp_path, "--no-patch") as server:
        write("file", b"one")
        before = server.get("/file").headers["ETag"]
        write("new", b"two")
        os.replace(tmp_path / "new", tmp_path / "file")
        assert server.get("/file").headers["ETag"] != before
        assert server.get("/file", If_None_Match=before).body == b"two"


def test_if_range(server: Server) -> None:
    first = server.get("/text.txt")
    for fresh in (first.headers["ETag"], first.headers["Last-Modified"]):
        answer = server.get("/text.txt", Range="bytes=1-3", If_Range=fresh)
        assert (answer.status, answer.body) == (206, b"123")
    for stale in ('"other"', "Fri, 14 Jul 2017 02:40:00 GMT"):
        answer = server.get("/text.txt", Range="bytes=1-3", If_Range=stale)
        assert (answer.status, answer.body) == (200, TEXT)
    assert server.get("/text.txt", Range="bytes=100-", If_Range='"other"').status == 200
