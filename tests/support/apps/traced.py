"""The applications of ``apps`` behind what watches applications in production, and what that saw.

The first part of a path names what is around the rest, the outermost first, as in
``/opentelemetry+validate/falcon/file.bin``; ``none`` is nothing. Flask and Django have Sentry's
integrations always. ``/events`` gives all that has been recorded since it was last asked for.
"""

from __future__ import annotations

import functools
import json
import socket
import sys
import wsgiref.validate
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import shift_path_info

if __name__ == "__main__":
    import gevent.monkey

    gevent.monkey.patch_all()

import apps
import newrelic.api.application
import newrelic.api.wsgi_application
import newrelic.core.config
import newrelic.core.stats_engine
import sentry_sdk
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.integrations.wsgi import SentryWsgiMiddleware
from werkzeug.wsgi import ClosingIterator

App = Callable[[dict[str, Any], Callable[..., Any]], Any]

events: list[Any] = []


class KeepingTransport(sentry_sdk.transport.Transport):
    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            seen = item.payload.json or {}
            trace = seen.get("contexts", {}).get("trace", {})
            errors = seen.get("exception", {}).get("values", [])
            named = [item.type, seen.get("transaction"), trace.get("op"), trace.get("status")]
            named += [[error["type"], error["value"], error["mechanism"]] for error in errors]
            named += [span["op"] for span in seen.get("spans", [])]
            events.append(["sentry", *named, seen.get("request", {}).get("url", "")[-20:]])


class KeepingExporter(InMemorySpanExporter):
    def export(self, spans: Any) -> Any:
        for span in spans:
            status = [span.status.status_code.name, span.status.description]
            raised = [
                dict(event.attributes).get("exception.message", event.name) for event in span.events
            ]
            code = span.attributes.get("http.status_code")
            events.append(["opentelemetry", span.name, *status, code, *raised])
        return super().export(spans)


def keep_new_relics() -> None:
    """Keep what New Relic's agent, which would send it away, is told of each transaction."""
    settings = newrelic.core.config.global_settings()
    settings.enabled = settings.developer_mode = True
    settings.app_name = "traced"
    settings.license_key = "none"
    record = newrelic.core.stats_engine.StatsEngine.record_transaction

    def keep(self: Any, transaction: Any) -> None:
        attributes = {each.name: each.value for each in transaction.agent_attributes}
        outputs = {name: attributes.get(f"wsgi.output.{name}") for name in ("bytes", "calls.yield")}
        errors = [[error.type, error.message] for error in transaction.errors]
        below = [child.name for child in transaction.root.children]
        events.append(["newrelic", transaction.path, outputs, errors, below])
        record(self, transaction)

    newrelic.core.stats_engine.StatsEngine.record_transaction = keep
    newrelic.api.application.application_instance("traced").activate(timeout=10)


class Keeping:
    """A wrapper that nobody knows."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def __iter__(self) -> Iterator[bytes]:
        yield from self._result

    def close(self) -> None:
        if hasattr(self._result, "close"):
            self._result.close()


def closing(app: App) -> App:
    return lambda environ, start_response: ClosingIterator(
        app(environ, start_response), lambda: events.append(["closed"])
    )


def unknown(app: App) -> App:
    return lambda environ, start_response: Keeping(app(environ, start_response))


@functools.cache
def around() -> dict[str, Callable[[App], App]]:
    keep_new_relics()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(KeepingExporter()))
    application = newrelic.api.application.application_instance("traced")
    sentry_sdk.init(
        dsn="http://key@localhost/1",
        transport=KeepingTransport,
        traces_sample_rate=1.0,
        default_integrations=False,
        auto_enabling_integrations=False,
        integrations=[FlaskIntegration(), DjangoIntegration()],
    )
    return {
        "none": lambda app: app,
        "sentry": SentryWsgiMiddleware,
        "newrelic": lambda app: newrelic.api.wsgi_application.WSGIApplicationWrapper(
            app, application
        ),
        "opentelemetry": lambda app: OpenTelemetryMiddleware(app, tracer_provider=provider),
        "validate": wsgiref.validate.validator,
        "closing": closing,
        "unknown": unknown,
    }


@functools.cache
def wrapped(names: str) -> App:
    app: App = apps.app
    for name in reversed(names.split("+")):
        app = around()[name](app)
    return app


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    if environ["PATH_INFO"] == "/events":
        answer = json.dumps(events).encode()
        events.clear()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]
    if environ["PATH_INFO"] == "/stats":
        return apps.app(environ, start_response)
    return wrapped(shift_path_info(environ) or "none")(environ, start_response)


if __name__ == "__main__":
    apps.main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), app)
