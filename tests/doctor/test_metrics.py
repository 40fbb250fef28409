"""Prometheus reads what ``gsplice.stats()`` tells, all of it. The line in the log."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import Pair, file_of, receiver, run_program
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import gsplice
from gsplice import metrics
from gsplice.config import MiB

#: What each field of Stats is for Prometheus.
NAMES = {
    "pipes_created": ("gsplice_pipes_created_total", {}),
    "pipes_closed": ("gsplice_pipes_closed_total", {}),
    "pipes_in_use": ("gsplice_pipes", {"state": "in_use"}),
    "pipes_idle": ("gsplice_pipes", {"state": "idle"}),
    "acquired_local": ("gsplice_pipes_acquired_total", {"source": "local"}),
    "acquired_global": ("gsplice_pipes_acquired_total", {"source": "global"}),
    "acquired_new": ("gsplice_pipes_acquired_total", {"source": "new"}),
    "transfers": ("gsplice_transfers_total", {}),
    "bytes_spliced": ("gsplice_transferred_bytes_total", {"way": "splice"}),
    "bytes_sendfile": ("gsplice_transferred_bytes_total", {"way": "sendfile"}),
    "bytes_copy_file_range": ("gsplice_transferred_bytes_total", {"way": "copy_file_range"}),
    "bytes_copied": ("gsplice_transferred_bytes_total", {"way": "memory"}),
    "offloads": ("gsplice_offloads_total", {}),
}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(families: Iterable[Metric]) -> Samples:
    found: Samples = {}
    for family in families:
        assert family.documentation.endswith("."), family
        assert family.type in ("counter", "gauge"), family
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def expected(stats: gsplice.Stats) -> Samples:
    numbers = stats.as_dict()
    found: Samples = {
        ("gsplice_fallbacks_total", (("reason", reason),)): count
        for reason, count in numbers.pop("fallbacks").items()
    }
    for field, (name, labels) in NAMES.items():
        found[name, tuple(labels.items())] = numbers.pop(field)
    assert not numbers, "a figure that Prometheus is not told"
    return found


@pytest.fixture
def some_traffic(tmp_path: Path, tcp: Callable[[], Pair]) -> None:
    """One transfer by sendfile, and one fallback."""
    near, far = tcp()
    receiving = receiver(far)
    with open(file_of(tmp_path / "file", 1 * MiB), "rb") as file:
        near.sendfile(file)
    gsplice.copyfileobj(io.BytesIO(b"x"), io.BytesIO())
    near.close()
    assert len(receiving.get()) == 1 * MiB


@pytest.mark.usefixtures("some_traffic")
def test_the_text_is_what_stats_tells() -> None:
    text, stats = metrics.prometheus_text(), gsplice.stats()
    found = samples_of(text_string_to_metric_families(text))
    assert found == expected(stats)
    assert found["gsplice_transferred_bytes_total", (("way", "splice"),)] >= 1 * MiB
    assert found["gsplice_fallbacks_total", (("reason", "source_type"),)] >= 1


def test_every_figure_has_its_own_name() -> None:
    names = [field.name for field in dataclasses.fields(gsplice.Stats)]
    figures = dict(zip(names, range(1, 100), strict=False)) | {
        "fallbacks": {"small": 98, "body": 99}
    }
    stats = gsplice.Stats(**figures)
    found = samples_of(text_string_to_metric_families(metrics.prometheus_text(stats)))
    assert found == expected(stats)
    assert len(set(found.values())) == len(found)
    assert all(f"``{name}``" in (metrics.__doc__ or "") for name, _ in found)


@pytest.mark.usefixtures("some_traffic")
def test_the_collector_gives_the_same() -> None:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(metrics.Collector())
    text, stats = generate_latest(registry).decode(), gsplice.stats()
    assert samples_of(text_string_to_metric_families(text)) == expected(stats)


def test_nothing_is_imported_before_it_is_used() -> None:
    run_program("""
import sys, gevent.monkey
before = set(sys.modules)
assert "logging" in before  # so gsplice may
import gsplice
assert "gsplice.metrics" not in sys.modules
gsplice.patch_all()
from gsplice import metrics
assert metrics.prometheus_text().startswith("# HELP gsplice_")
metrics.Collector()
assert not any(name.startswith("prometheus_client") for name in sys.modules)
""")


def test_what_is_patched_is_logged_once() -> None:
    printed = run_program("""
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s", level="INFO")
import gsplice
print(result := gsplice.patch_all())
gsplice.patch_all()
import http.client
import gevent.pywsgi
gsplice.patch_all()
gsplice.unpatch_all()
gsplice.patch_all(shutil=False, pywsgi=False)
""").splitlines()
    logged, result, *rest = printed
    assert logged == f"INFO gsplice {result}"
    assert rest[0].startswith("INFO gsplice patched: http.client.HTTPConnection.")
    assert rest[1].startswith("INFO gsplice patched: pywsgi.WSGIHandler.")
    assert rest[2].startswith("INFO gsplice patched: socket.sendfile, ")
    assert len(rest) == 3


def test_without_logging_set_up_nothing_is_printed() -> None:
    assert run_program("import gsplice; gsplice.patch_all()") == ""
