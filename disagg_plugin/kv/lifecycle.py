"""Life of one transfer as a table of states and events; no I/O, no clock, the same on both sides.

    OFFERED ──accept──▶ ACCEPTED ──start──▶ STARTED ──ready──▶ READY ──chunk──▶ STREAMING ──complete──▶ LANDED
       │                    │                  │                 │                  │
       └────────────────────┴──── fail, abort, deadline, peer_lost ─────────────────┴──────────────▶ ABANDONED

    OFFERED, ACCEPTED, STARTED ──repair──▶ OFFERED          another prefill engine, nothing is held yet
    READY, STREAMING ──suspend──▶ SUSPENDED ──ready──▶ READY    another one for what has not landed

On the prefill side, the classical flow goes from STARTED to HELD (KV is complete before a decode engine is known; a
decode engine's offer is its ACCEPT) and goes on with READY. LANDED and ABANDONED absorb every later event: late
messages are normal, acting on them is not.
"""

import enum

from disagg_plugin.errors import DisaggError


class State(enum.Enum):
    """Where a transfer stands."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    STARTED = "started"
    HELD = "held"
    READY = "ready"
    STREAMING = "streaming"
    SUSPENDED = "suspended"
    LANDED = "landed"
    ABANDONED = "abandoned"


class Event(enum.Enum):
    """What can happen to it."""

    ACCEPT = "accept"
    START = "start"
    HOLD = "hold"
    READY = "ready"
    CHUNK = "chunk"
    COMPLETE = "complete"
    REPAIR = "repair"
    SUSPEND = "suspend"
    FAIL = "fail"
    ABORT = "abort"
    DEADLINE = "deadline"
    PEER_LOST = "peer_lost"


class IllegalTransition(DisaggError):
    """A peer, or we ourselves, did something that the protocol does not know in this state."""


ENDINGS = dict.fromkeys((Event.FAIL, Event.ABORT, Event.DEADLINE, Event.PEER_LOST), State.ABANDONED)

# START may overtake ACCEPT (it comes from another thread of the peer); READY may precede START when the prefill
# side announced a start within ``alloc_lead_s``; a transfer of one chunk completes without a separate CHUNK.
TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OFFERED: {
        Event.ACCEPT: State.ACCEPTED,
        Event.START: State.STARTED,
        Event.REPAIR: State.OFFERED,
        **ENDINGS,
    },
    State.ACCEPTED: {
        Event.START: State.STARTED,
        Event.READY: State.READY,
        Event.REPAIR: State.OFFERED,
        **ENDINGS,
    },
    State.STARTED: {
        Event.ACCEPT: State.STARTED,
        Event.START: State.STARTED,
        Event.HOLD: State.HELD,
        Event.READY: State.READY,
        Event.REPAIR: State.OFFERED,
        **ENDINGS,
    },
    State.HELD: {Event.ACCEPT: State.HELD, Event.READY: State.READY, **ENDINGS},
    State.READY: {
        Event.ACCEPT: State.READY,
        Event.START: State.READY,
        Event.CHUNK: State.STREAMING,
        Event.COMPLETE: State.LANDED,
        Event.SUSPEND: State.SUSPENDED,
        **ENDINGS,
    },
    State.STREAMING: {
        Event.START: State.STREAMING,
        Event.CHUNK: State.STREAMING,
        Event.COMPLETE: State.LANDED,
        Event.SUSPEND: State.SUSPENDED,
        **ENDINGS,
    },
    # everything may have landed just before the sender was given up
    State.SUSPENDED: {
        Event.ACCEPT: State.SUSPENDED,
        Event.START: State.SUSPENDED,
        Event.READY: State.READY,
        Event.COMPLETE: State.LANDED,
        **ENDINGS,
    },
    State.LANDED: dict.fromkeys(Event, State.LANDED),
    State.ABANDONED: dict.fromkeys(Event, State.ABANDONED),
}

OVER = frozenset({State.LANDED, State.ABANDONED})
LOADING = frozenset({State.READY, State.STREAMING})


def advance(state: State, event: Event) -> State:
    """The state after ``event``.

    Raises:
        IllegalTransition: The table has no such transition.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"{event.name} is not possible in state {state.name}") from None
