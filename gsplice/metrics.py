"""The counters of :func:`gsplice.stats` for Prometheus: as text, or through ``prometheus_client``.

Without a dependency, in a WSGI application or any other answer to a scrape::

    from gsplice.metrics import CONTENT_TYPE, prometheus_text
    start_response("200 OK", [("Content-Type", CONTENT_TYPE)])
    return [prometheus_text().encode()]

Beside other metrics, with ``pip install 'gsplice[prometheus]'``::

    from prometheus_client import REGISTRY
    from gsplice.metrics import Collector
    REGISTRY.register(Collector())

``gsplice_transfers_total``
    Transfers that moved at least one byte.
``gsplice_transferred_bytes_total`` by ``way``: splice, sendfile, copy_file_range, memory
    Bytes delivered inside the kernel (by sendfile: of files for which the pool had no pipe), or
    through Python's memory as part of such a transfer.
``gsplice_fallbacks_total`` by ``reason``
    Calls handed to the original function, or finished by it. The reasons are in docs/taken.md.
``gsplice_offloads_total``
    Disk waits that went to a thread.
``gsplice_pipes_created_total``, ``gsplice_pipes_closed_total``
    Pipes made and closed.
``gsplice_pipes_acquired_total`` by ``source``: local, global, new
    Pipes asked for and had, from the hub's own list, from the shared one, or from the kernel.
``gsplice_pipes``, a gauge, by ``state``: in_use, idle
    Pipes open now.

Each process counts for itself: with several workers, a scrape reaches one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from ._counters import Stats, stats

#: The type of :func:`prometheus_text`, version 0.0.4 of Prometheus' text format.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


#: What each reason of ``stats().fallbacks`` means, in a few words; docs/taken.md says more.
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "source_type": "the source is of a type not taken, or not open for reading",
        "destination_type": "the destination is of a type not taken, or not open for writing",
        "socket_type": "not a stream socket of gevent's own class",
        "small": "reading and writing is as fast",
        "body": "an HTTP body that is chunked, decoded, at its end, absent, or read in another way",
        "closed": "a closed object",
        "timed_out": "refuses to read after a timeout",
        "nonblocking": "an object that does not wait",
        "blocking": "a socket whose descriptor has been made blocking",
        "other_hub": "an object of another thread's hub, or no hub to wait on",
        "standard_stream": "the destination is standard output or error",
        "replaced": "a function of os that is not Python's own is to be called",
        "append": "an append-only destination",
        "same_file": "a file copied onto itself",
        "file_to_pipe": "a file into a pipe is read and written",
        "arguments": "an offset or length that only the original can make sense of",
        "response": "a response or handler that needs every byte to pass through Python",
        "result_type": "a large response in an iterable or wrapper of a type not known",
        "size": "the file is longer or shorter than its filesystem says",
        "no_pipe": "the pool had no pipe to lend",
        "refused": "the kernel, a filesystem or a sandbox would not, or a file gave an error",
    }
)


class _Family(NamedTuple):
    """One metric: its samples come from *fields* of Stats, each with its value of *label*."""

    name: str
    type: str
    help: str
    label: str
    fields: Mapping[str, str]


_FAMILIES: Final = (
    _Family(
        "gsplice_transfers_total",
        "counter",
        "Transfers that moved at least one byte.",
        "",
        {"transfers": ""},
    ),
    _Family(
        "gsplice_transferred_bytes_total",
        "counter",
        "Bytes delivered inside the kernel, or through Python's memory as part of a transfer.",
        "way",
        {
            "bytes_spliced": "splice",
            "bytes_sendfile": "sendfile",
            "bytes_copy_file_range": "copy_file_range",
            "bytes_copied": "memory",
        },
    ),
    _Family(
        "gsplice_offloads_total",
        "counter",
        "Disk waits that went to a thread.",
        "",
        {"offloads": ""},
    ),
    _Family(
        "gsplice_pipes_created_total",
        "counter",
        "Pipes made.",
        "",
        {"pipes_created": ""},
    ),
    _Family(
        "gsplice_pipes_closed_total",
        "counter",
        "Pipes closed.",
        "",
        {"pipes_closed": ""},
    ),
    _Family(
        "gsplice_pipes_acquired_total",
        "counter",
        "Pipes had from the hub's own list, from the shared one, or from the kernel.",
        "source",
        {"acquired_local": "local", "acquired_global": "global", "acquired_new": "new"},
    ),
    _Family(
        "gsplice_pipes",
        "gauge",
        "Pipes open now.",
        "state",
        {"pipes_in_use": "in_use", "pipes_idle": "idle"},
    ),
)
_FALLBACKS: Final = _Family(
    "gsplice_fallbacks_total",
    "counter",
    "Calls handed to the original function, or finished by it, by reason.",
    "reason",
    {},
)


def _samples(figures: Stats) -> Iterator[tuple[_Family, list[tuple[str, int]]]]:
    """Yield each family with its samples: (the label's value, the number)."""
    for family in _FAMILIES:
        yield family, [(value, getattr(figures, name)) for name, value in family.fields.items()]
    yield _FALLBACKS, sorted(figures.fallbacks.items())


def prometheus_text(figures: Stats | None = None) -> str:
    """Return *figures*, by default those of this moment, in Prometheus' text format.

    An answer with it has the type :data:`CONTENT_TYPE` and is encoded as UTF-8.
    """
    lines = []
    for family, samples in _samples(figures or stats()):
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.type}"]
        for value, number in samples:
            label = f'{{{family.label}="{value}"}}' if family.label else ""
            lines.append(f"{family.name}{label} {number}")
    return "\n".join([*lines, ""])


class Collector:
    """A collector for ``prometheus_client``: ``REGISTRY.register(Collector())``."""

    def collect(self) -> Iterator[Any]:
        """Yield the figures of this moment as ``prometheus_client``'s metric families.

        ModuleNotFoundError without ``prometheus_client``.
        """
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family, samples in _samples(stats()):
            kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
            labels = [family.label] if family.label else []
            metric = kind(family.name, family.help, labels=labels)
            for value, number in samples:
                metric.add_metric([value] if family.label else [], number)
            yield metric
