"""Spans of a transfer: one trace with the client's, made of recorded times, and nothing where tracing is off."""

import subprocess
import sys
import time
from collections.abc import Mapping

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.spans import MAX_REMEMBERED, TransferSpans, active_tracer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
FIELDS = ("asked_s", "offered_s", "accepted_s", "started_s", "first_chunk_s", "last_chunk_s", "landed_s")


class Bench:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = TransferSpans(provider.get_tracer("test"), threaded=False)

    def made(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def landed(ended_s: float, **more: object) -> dict[str, object]:
    """A transfer that took 0.6 s and landed at ``ended_s``."""
    times = {field: ended_s - 0.6 + i / 10 for i, field in enumerate(FIELDS)}
    return {"request_id": "r1", "state": "landed", "prefill_ended_s": ended_s - 0.15, **times, **more}


def seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None
    assert span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_landed_transfer_is_one_trace_with_the_clients_request():
    bench = Bench()
    bench.spans.remember("r1", HEADERS)
    bench.spans.transfer_over("decode", landed(time.monotonic(), peer="p:1", prompt_tokens=900))
    made = bench.made()
    assert set(made) == {
        *("disagg.transfer", "disagg.decide", "disagg.offer", "disagg.prefill", "disagg.chunks", "disagg.land"),
    }
    parent = made["disagg.transfer"]
    assert parent.parent is not None
    assert f"{parent.parent.span_id:016x}" == CLIENT_SPAN
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE}
    children = [span for name, span in made.items() if name != "disagg.transfer"]
    assert {span.parent.span_id for span in children if span.parent} == {parent.context.span_id}
    assert dict(parent.attributes or {}) == {
        "disagg.request_id": "r1",
        "disagg.state": "landed",
        "disagg.peer": "p:1",
        "disagg.prompt_tokens": 900,
    }


def test_times_are_those_that_were_recorded():
    bench = Bench()
    ended_s = time.monotonic() - 30.0  # what was recorded counts, not when the spans are made
    bench.spans.transfer_over("decode", landed(ended_s))
    made = bench.made()
    assert seconds(made["disagg.transfer"]) == pytest.approx(0.6, abs=1e-3)
    assert seconds(made["disagg.chunks"]) == pytest.approx(0.1, abs=1e-3)
    ended_ns = made["disagg.transfer"].end_time
    assert ended_ns is not None
    assert ended_ns / 1e9 == pytest.approx(time.time() - 30.0, abs=1.0)


def test_a_fallback_says_when_and_why():
    bench = Bench()
    now_s = time.monotonic()
    row = {"request_id": "r1", "offered_s": now_s - 3, "accepted_s": now_s - 2, "given_up_s": now_s - 1}
    bench.spans.transfer_over("decode", {**row, "failure": "peer_lost", "landed_s": 0.0})
    made = bench.made()
    assert set(made) == {"disagg.transfer", "disagg.offer", "disagg.fallback"}
    assert made["disagg.transfer"].status.status_code is StatusCode.ERROR
    assert made["disagg.transfer"].status.description == "peer_lost"


def test_the_prefill_engines_part_has_its_own_names():
    bench = Bench()
    now_s = time.monotonic()
    fields = ("offered_s", "started_s", "last_computed_s", "acknowledged_s")
    bench.spans.transfer_over("prefill", {field: now_s - 1 + i / 10 for i, field in enumerate(fields)})
    assert set(bench.made()) == {"disagg.export", "disagg.queue", "disagg.compute", "disagg.acknowledge"}


def test_a_request_without_a_trace_begins_its_own():
    bench = Bench()
    bench.spans.transfer_over("decode", landed(time.monotonic()))
    assert bench.made()["disagg.transfer"].parent is None


def test_a_transfer_that_never_began_gives_no_span():
    bench = Bench()
    bench.spans.transfer_over("decode", {"request_id": "r1"})
    assert not bench.made()


@pytest.mark.parametrize("headers", [HEADERS, None], ids=["headers", "no headers"])
def test_without_a_tracer_nothing_is_kept_and_no_thread_starts(headers: Mapping[str, str] | None):
    spans = TransferSpans(None)
    spans.remember("r1", headers)
    spans.transfer_over("decode", landed(time.monotonic()))
    assert spans.headers_of("r1") == {}
    assert spans._pool is None


def test_what_is_remembered_is_bounded():
    bench = Bench()
    for i in range(MAX_REMEMBERED + 1):
        bench.spans.remember(f"r{i}", HEADERS)
    assert bench.spans.headers_of("r0") == {}
    assert bench.spans.headers_of("r1") == HEADERS


def test_spans_are_made_on_a_thread_and_an_exporter_that_raises_does_not_end_it(caplog: pytest.LogCaptureFixture):
    bench = Bench()
    spans = TransferSpans(bench.spans._tracer)
    assert spans._pool is not None
    spans.transfer_over("nonsense", {})
    spans.transfer_over("decode", landed(time.monotonic()))
    spans._pool.submit(lambda: None).result(10)
    assert "disagg.transfer" in bench.made()
    assert "could not be made" in caplog.text
    spans.close()


def test_the_journal_passes_transfers_on():
    journal, heard = Journal(), []
    journal.on_transfer_over(lambda role, row: heard.append((role, row)))
    journal.transfer_over("decode", {"request_id": "r1"})
    assert heard == [("decode", {"request_id": "r1"})]


def test_a_process_without_a_tracer_provider_has_no_tracer():
    assert active_tracer() is None


def test_the_core_works_without_opentelemetry():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from disagg_plugin.observability.spans import TransferSpans, active_tracer\n"
        "spans = TransferSpans(active_tracer()); spans.transfer_over('decode', {'offered_s': 1.0, 'accepted_s': 2.0})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_provider_that_was_set_up_is_used():
    code = (
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "trace.set_tracer_provider(TracerProvider())\n"
        "from disagg_plugin.observability.spans import active_tracer\n"
        "assert active_tracer() is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
