"""OpenTelemetry spans of a transfer, made from its recorded times once it is over; without a tracer, nothing at all.

    disagg.transfer                 decode engine: under the client's own span, beside vLLM's ``llm_request``
      disagg.decide                 the policies
      disagg.offer                  until a prefill worker accepted
      disagg.prefill                until that worker answered the HTTP call: its queue and its compute
      disagg.chunks                 from the first chunk to the last one
      disagg.land                   from the last chunk to its place in the KV cache
      disagg.fallback               when and why it was given up
    disagg.export                   prefill engine: under the same trace, for the offload call carries it on
      disagg.queue, disagg.compute, disagg.acknowledge

The engine sets the tracer provider up (vLLM: ``--otlp-traces-endpoint``). Spans are made on a thread of their own.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from disagg_plugin.observability.journal import Row

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096  # requests whose trace context is kept until their transfer is over
MAX_WAITING = 1024  # transfers that wait for the thread

# name, from, to; fields of the rows that the roles describe transfers with
_CHILDREN: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "decode": (
        ("disagg.decide", "asked_s", "offered_s"),
        ("disagg.offer", "offered_s", "accepted_s"),
        ("disagg.prefill", "accepted_s", "prefill_ended_s"),
        ("disagg.chunks", "first_chunk_s", "last_chunk_s"),
        ("disagg.land", "last_chunk_s", "landed_s"),
        ("disagg.fallback", "given_up_s", "given_up_s"),
    ),
    "prefill": (
        ("disagg.queue", "offered_s", "started_s"),
        ("disagg.compute", "started_s", "last_computed_s"),
        ("disagg.acknowledge", "last_computed_s", "acknowledged_s"),
    ),
}
_PARENT = {"decode": "disagg.transfer", "prefill": "disagg.export"}
_ATTRIBUTES = (
    *("request_id", "transfer_id", "state", "peer", "reason", "failure", "prompt_tokens", "first_token"),
    *("end_token", "chunks", "wire_bytes", "raw_bytes"),
)


def active_tracer() -> "Tracer | None":
    """A tracer, if this process has a tracer provider; None without OpenTelemetry, or where tracing is off."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer("disagg_plugin")


class TransferSpans:
    """Of one scheduler process."""

    def __init__(self, tracer: "Tracer | None", *, threaded: bool = True) -> None:
        """
        Args:
            threaded: False: spans are made at once, in the caller's thread (tests).
        """
        self._tracer = tracer
        self._headers: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "disagg-spans") if tracer is not None and threaded else None
        self._waiting = 0
        self.dropped = 0

    def remember(self, request_id: str, headers: Mapping[str, str] | None) -> None:
        """The trace context that a request came with, in W3C headers; a transfer may be over after its request."""
        if self._tracer is not None and headers:
            self._headers[request_id] = headers
            if len(self._headers) > MAX_REMEMBERED:
                self._headers.popitem(last=False)

    def headers_of(self, request_id: str) -> Mapping[str, str]:
        """What an offload call carries on; empty while tracing is off."""
        return self._headers.get(request_id, {})

    def transfer_over(self, role: str, row: Row) -> None:
        """Make the spans of a transfer that ended; its times are ``time.monotonic`` seconds of this host."""
        if (tracer := self._tracer) is None:
            return
        headers = self._headers.get(str(row.get("request_id")), {})
        if self._pool is None:
            _make(tracer, role, row, headers)
        elif self._waiting < MAX_WAITING:
            self._waiting += 1
            self._pool.submit(self._make_within_boundary, tracer, role, row, headers)
        else:
            self.dropped += 1

    def _make_within_boundary(self, tracer: "Tracer", role: str, row: Row, headers: Mapping[str, str]) -> None:
        try:
            _make(tracer, role, row, headers)
        except Exception:  # an exporter or a processor of the user's: what it raises must not end the thread
            logger.exception("disagg: a transfer's spans could not be made")
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _make(tracer: "Tracer", role: str, row: Row, headers: Mapping[str, str]) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import Status, StatusCode

    spans = [
        (name, start, end) for name, a, b in _CHILDREN[role] if (start := _time(row, a)) and (end := _time(row, b))
    ]
    if not spans:
        return
    to_epoch = _epoch_clock()
    parent = tracer.start_span(
        _PARENT[role],
        context=_context(headers),
        start_time=to_epoch(min(start for _, start, _ in spans)),
        attributes={f"disagg.{name}": value for name in _ATTRIBUTES if (value := _attribute(row, name)) is not None},
    )
    if failure := row.get("failure"):
        parent.set_status(Status(StatusCode.ERROR, str(failure)))
    inside = trace.set_span_in_context(parent)
    for name, start, end in spans:
        child = tracer.start_span(name, context=inside, start_time=to_epoch(start))
        child.end(to_epoch(max(start, end)))
    parent.end(to_epoch(max(end for _, _, end in spans)))


def _context(headers: Mapping[str, str]) -> "Context | None":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers) if headers else None


def _time(row: Row, field: str) -> float:
    value = row.get(field)
    return value if isinstance(value, float) else 0.0


def _attribute(row: Row, name: str) -> Any:
    value = row.get(name)
    return value if isinstance(value, str | int | float) and value != "" else None


def _epoch_clock() -> Callable[[float], int]:
    """From ``time.monotonic`` seconds to nanoseconds since 1970."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda at_s: int(at_s * 1e9) + offset_ns
