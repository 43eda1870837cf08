"""The fault matrix: what may go wrong, when, and what happens then. Drives the tests and ``docs/fault-matrix.md``.

queued      P has the prompt and has not begun; D holds nothing
streaming   about half of the KV stands in D's cache, the rest is not computed yet
landed      all of it has landed, D decodes
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Moment = Literal["queued", "streaming", "landed"]
MOMENTS: tuple[Moment, ...] = ("queued", "streaming", "landed")

Outcome = Literal["offloaded", "elsewhere", "kept", "local", "gone", "died"]
OUTCOMES: Mapping[Outcome, str] = {
    "offloaded": "The KV comes from P, whole",
    "elsewhere": "Another P delivers what had not landed",
    "kept": "D keeps what landed and computes the rest",
    "local": "D computes the prompt",
    "gone": "The request is over, nobody computes anything",
    "died": "The request dies with D; its client sees the connection break",
}


@dataclass(frozen=True)
class Cell:
    """What happens, and how it shows.

    Attributes:
        reasons: One of these is the cause that D counts; empty: it counts no fallback.
        counts: Counters that rise by at least so much: ``side.path.to.it`` in ``Fleet.figures``.
        note: What else the document should say.
    """

    outcome: Outcome
    reasons: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class CannotOccur:
    """Why there is nothing to test."""

    why: str


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        strike: Name of the function in ``faults.strikes`` that does it.
        engines: Test on real engines, if engine state is involved.
    """

    title: str
    strike: str
    cells: tuple[Cell | CannotOccur, Cell | CannotOccur, Cell | CannotOccur]
    engines: str = ""

    def at(self, moment: Moment) -> Cell | CannotOccur:
        return self.cells[MOMENTS.index(moment)]


LANDED_FINE = Cell("offloaded", note="nothing of P is needed any more")
NO_CHUNK = CannotOccur("no chunk is under way yet")
OVER = CannotOccur("every chunk has landed")
LOST = ("peer_lost", "peer_silent", "peer_restarted", "http_connection_lost")
BROKEN = (*LOST, "transport", "stalled", "discarded")
E2E = "tests/e2e/test_3_faults.py"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "P is killed",
        "p_killed",
        (Cell("local", LOST), Cell("kept", (*LOST, "stalled")), LANDED_FINE),
        f"{E2E}::test_a_prefill_worker_that_dies_while_streaming_costs_only_time",
    ),
    Fault(
        "P is killed, another P is there",
        "p_killed_of_two",
        (
            Cell("elsewhere", counts={"d.repairs": 1}),
            Cell("elsewhere", counts={"d.repairs": 1}, note="only what had not landed travels again"),
            LANDED_FINE,
        ),
    ),
    Fault(
        "P stops (SIGSTOP) and wakes up later",
        "p_stopped",
        (
            Cell("local", (*LOST, "timeout_accepted")),
            Cell("kept", (*LOST, "stalled"), note="what P writes after it woke up is discarded"),
            LANDED_FINE,
        ),
        f"{E2E}::test_a_prefill_worker_that_stops_and_wakes_up_again",
    ),
    Fault(
        "P restarts at once (new epoch)",
        "p_restarted",
        (Cell("local", LOST), Cell("kept", (*LOST, "stalled")), LANDED_FINE),
        f"{E2E}::test_a_restarted_prefill_worker_is_used_again",
    ),
    Fault(
        "P is told to leave (drain, SIGTERM)",
        "p_drains",
        (
            Cell("local", ("draining",), {"p.drop_draining": 1, "d.decision_draining": 1}, note="P hands it back"),
            Cell("offloaded", counts={"d.decision_draining": 1}, note="P ends what it has begun"),
            Cell("offloaded", counts={"d.decision_draining": 1}, note="nothing of P is needed any more"),
        ),
        f"{E2E}::test_a_prefill_worker_that_is_told_to_leave_ends_what_it_has_begun",
    ),
    Fault(
        "P is told to leave, another P is there",
        "p_drains_of_two",
        (
            Cell("elsewhere", counts={"p.drop_draining": 1, "d.repairs": 1}),
            Cell("offloaded", note="P ends what it has begun"),
            LANDED_FINE,
        ),
    ),
    Fault(
        "P is full: refuses the offer",
        "p_refuses",
        (
            Cell("local", ("refused_queue_full",), {"p.refused_queue_full": 1}),
            CannotOccur("what P accepted it does not refuse later"),
            CannotOccur("what P accepted it does not refuse later"),
        ),
    ),
    Fault(
        "P is full: HTTP 429",
        "p_answers_429",
        (
            Cell("local", ("http_429",)),
            CannotOccur("an engine answers with a status before it computes"),
            CannotOccur("an engine answers with a status before it computes"),
        ),
    ),
    Fault(
        "P is full: HTTP 503, another P is there",
        "p_answers_503_of_two",
        (
            Cell("elsewhere", counts={"d.repairs": 1}),
            CannotOccur("an engine answers with a status before it computes"),
            CannotOccur("an engine answers with a status before it computes"),
        ),
    ),
    Fault(
        "P is slow",
        "p_slow",
        (
            Cell("local", ("timeout_accepted",), note="not begun within `start_timeout_s`"),
            Cell("kept", ("stalled",), {"d.receive_deadlines": 1}, note="no chunk for `stall_timeout_s`"),
            CannotOccur("nothing of P is needed any more"),
        ),
    ),
    Fault(
        "P preempts the prompt",
        "p_preempts",
        (
            CannotOccur("a waiting prompt has nothing that could be taken"),
            Cell("offloaded", counts={"p.preempted": 1}, note="P computes it again and goes on where D stands"),
            LANDED_FINE,
        ),
        "tests/e2e/test_7_edge_engines.py::test_a_prompt_whose_prefill_is_preempted_arrives_all_the_same",
    ),
    Fault(
        "P's cache is full of finished prompts",
        "p_holds",
        (
            Cell("local", ("hold_expired",), {"p.drop_hold_expired": 1}, note="D has no room: P keeps it for `hold_s`"),
            CannotOccur("P keeps blocks only until their KV is staged"),
            CannotOccur("P keeps blocks only until their KV is staged"),
        ),
    ),
    Fault(
        "D's client goes away",
        "d_aborts",
        (
            Cell("gone", counts={"d.aborted": 1}),
            Cell("gone", counts={"d.aborted": 1}, note="P stops computing; late chunks are discarded"),
            Cell("gone"),
        ),
        f"{E2E}::test_a_client_that_goes_away_frees_everything_on_both_sides",
    ),
    Fault(
        "D's client goes away in the step that allocates",
        "d_aborts_at_allocation",
        (
            Cell("gone", counts={"d.aborted": 1}),
            CannotOccur("blocks are allocated once"),
            CannotOccur("blocks are allocated once"),
        ),
    ),
    Fault(
        "D preempts the request",
        "d_preempts",
        (
            CannotOccur("a waiting request has nothing that could be taken"),
            CannotOccur("engines do not preempt a request that waits for KV"),
            Cell("local", (), {"d.landed": 1}, note="it is not offered again"),
        ),
        f"{E2E}::test_a_preempted_request_is_computed_here",
    ),
    Fault(
        "D is killed and starts again",
        "d_killed",
        (
            Cell("died", counts={"p.drops": 1}),
            Cell("died", counts={"p.drops": 1}, note="P frees blocks and slots"),
            Cell("died"),
        ),
    ),
    Fault(
        "The HTTP link is cut",
        "http_cut",
        (
            Cell("local", ("http_connection_lost",)),
            Cell("kept", ("http_connection_lost",)),
            LANDED_FINE,
        ),
    ),
    Fault(
        "The side channel is cut",
        "side_cut",
        (Cell("local", LOST), Cell("kept", LOST), LANDED_FINE),
    ),
    Fault(
        "The KV link is cut",
        "kv_cut",
        (Cell("local", BROKEN), Cell("kept", BROKEN), LANDED_FINE),
    ),
    Fault(
        "The KV link stalls, and moves again later",
        "kv_stalled",
        (
            Cell("local", BROKEN),
            Cell("kept", BROKEN, note="what arrives after that is discarded"),
            LANDED_FINE,
        ),
    ),
    Fault(
        "The KV link is throttled",
        "kv_throttled",
        (Cell("offloaded"), Cell("offloaded"), LANDED_FINE),
    ),
    Fault(
        "A chunk is corrupt",
        "chunk_corrupt",
        (
            NO_CHUNK,
            Cell("offloaded", counts={"d.nacks": 1, "d.checksum_failures": 1, "p.chunks_resent": 1}),
            OVER,
        ),
        "tests/e2e/test_8_tensor_parallel.py::test_a_chunk_of_one_rank_that_is_damaged_is_asked_for_again",
    ),
    Fault(
        "A chunk is corrupt, and again when it is repeated",
        "chunk_corrupt_twice",
        (NO_CHUNK, Cell("kept", ("bad_chunk",), {"d.nacks": 2}), OVER),
    ),
    Fault(
        "A chunk is corrupt twice, another P is there",
        "chunk_corrupt_twice_of_two",
        (NO_CHUNK, Cell("elsewhere", counts={"d.nacks": 2, "d.repairs": 1}), OVER),
    ),
    Fault(
        "A chunk is truncated",
        "chunk_truncated",
        (NO_CHUNK, Cell("offloaded", counts={"d.nacks": 1, "p.chunks_resent": 1}), OVER),
    ),
    Fault(
        "A chunk is late: it lands after its transfer was given up",
        "chunk_late",
        (NO_CHUNK, Cell("kept", ("stalled",), {"d.late": 1}), OVER),
    ),
    Fault(
        "A chunk is foreign: of a ticket that nobody has",
        "chunk_foreign",
        (
            Cell("offloaded", counts={"d.foreign": 1}),
            Cell("offloaded", counts={"d.foreign": 1}),
            Cell("offloaded", counts={"d.foreign": 1}),
        ),
    ),
    Fault(
        "A chunk is replayed",
        "chunk_replayed",
        (
            NO_CHUNK,
            Cell("offloaded", counts={"d.replays": 1}),
            Cell("offloaded", counts={"d.late": 1}),
        ),
    ),
    Fault(
        "The ring is exhausted: no slot is free",
        "ring_full",
        (
            NO_CHUNK,
            Cell("offloaded", counts={"p.credit_waits": 1, "d.buffer_waits": 1}, note="P waits for credit"),
            OVER,
        ),
    ),
    Fault(
        "The ring is exhausted: no region is left for a second P",
        "no_region",
        (
            Cell("offloaded", note="the first P is used, the second shows as `ring_exhausted`"),
            CannotOccur("a region is taken when a P is added"),
            CannotOccur("a region is taken when a P is added"),
        ),
    ),
    Fault(
        "P comes back with a wrong key",
        "p_with_a_wrong_key",
        (
            Cell("local", LOST, note="`authentication_failed`; never used"),
            Cell("kept", (*LOST, "stalled"), note="`authentication_failed`; never used"),
            LANDED_FINE,
        ),
    ),
    Fault(
        "P comes back with other weights",
        "p_with_other_weights",
        (
            Cell("local", LOST, {"d.rejected_weights_digest": 1}, note="refused; never used"),
            Cell("kept", (*LOST, "stalled"), {"d.rejected_weights_digest": 1}, note="refused; never used"),
            Cell("offloaded", counts={"d.rejected_weights_digest": 1}, note="refused; never used"),
        ),
        f"{E2E}::test_a_worker_with_other_weights_is_refused_once_and_never_used",
    ),
    Fault(
        "P comes back with an old protocol",
        "p_with_an_old_protocol",
        (
            Cell("local", LOST, {"d.rejected_protocol": 1}, note="refused; never used"),
            Cell("kept", (*LOST, "stalled"), {"d.rejected_protocol": 1}, note="refused; never used"),
            Cell("offloaded", counts={"d.rejected_protocol": 1}, note="refused; never used"),
        ),
    ),
    Fault(
        "Garbage on both side channels, and in the notifications",
        "garbage",
        (
            Cell("offloaded", counts={"p.malformed": 1, "p.handshake_failed": 1, "d.unparsable": 1}),
            Cell("offloaded", counts={"p.malformed": 1, "p.handshake_failed": 1, "d.unparsable": 1}),
            Cell("offloaded", counts={"p.malformed": 1, "p.handshake_failed": 1, "d.unparsable": 1}),
        ),
    ),
    Fault(
        "A flood of connections and messages on P's side channel",
        "flood",
        (
            Cell("offloaded", counts={"p.refused_unknown_peer": 100}),
            Cell("offloaded", counts={"p.refused_unknown_peer": 100}),
            Cell("offloaded", counts={"p.refused_unknown_peer": 100}),
        ),
    ),
)
