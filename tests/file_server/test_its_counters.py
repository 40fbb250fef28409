"""The counters, as the server shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from example_file_server import (
    BIG,
    Server,
    serving,
)


def moved(stats: dict[str, Any]) -> int:
    return int(stats["bytes_sendfile"] + stats["bytes_spliced"])


def test_counters_prove_the_fast_path(root: Path) -> None:
    with serving(root) as server:
        before = moved(server.stats())
        assert server.get("/big.bin").body == BIG
        after_file = moved(server.stats())
        assert after_file - before == len(BIG)
        answer = server.get("/big.bin", Range="bytes=1000001-2000000")
        assert answer.body == BIG[1_000_001:2_000_001]
        assert moved(server.stats()) - after_file == 1_000_000
        assert server.get("/big.bin", method="HEAD").status == 200
        assert moved(server.stats()) - after_file == 1_000_000


def test_counters_stay_at_zero_without_the_patch(root: Path) -> None:
    with serving(root, "--no-patch") as server:
        assert server.get("/big.bin").body == BIG
        assert server.get("/big.bin", Range="bytes=0-999999").body == BIG[:1_000_000]
        stats = server.stats()
    assert moved(stats) == 0
    assert stats["bytes_copied"] == 0


def test_stats_pages(server: Server) -> None:
    answer = server.get("/.stats.json")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    stats = json.loads(answer.body)
    assert {"pipes_created", "transfers", "bytes_spliced", "bytes_sendfile"} <= set(stats)
    assert isinstance(stats["fallbacks"], dict)
    page = server.get("/.stats")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b'fetch(".stats.json"' in page.body
    assert not re.search(rb"(src|href)=\"(https?:)?//", page.body), "nothing from elsewhere"


def test_stats_page_says_whether_gsplice_is_at_work(root: Path) -> None:
    with serving(root) as patched, serving(root, "--no-patch") as plain:
        assert b"Not patched" not in patched.get("/.stats").body
        assert b"Not patched" in plain.get("/.stats").body
