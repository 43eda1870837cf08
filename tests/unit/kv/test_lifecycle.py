"""The life of a transfer: every state meets every event, and only the table's transitions are possible."""

import itertools

import pytest

from disagg_plugin.kv.lifecycle import ENDINGS, OVER, TRANSITIONS, Event, IllegalTransition, State, advance

HAPPY = [Event.ACCEPT, Event.START, Event.READY, Event.CHUNK, Event.CHUNK, Event.COMPLETE]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)), ids=lambda v: v.name.lower())
def test_every_event_in_every_state_is_either_in_the_table_or_refused(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event.name} is not possible in state {state.name}"):
            advance(state, event)


def test_the_ordinary_life_ends_landed() -> None:
    state = State.OFFERED
    for event in HAPPY:
        state = advance(state, event)
    assert state is State.LANDED


@pytest.mark.parametrize("ending", list(ENDINGS), ids=lambda e: e.name.lower())
@pytest.mark.parametrize("state", [s for s in State if s not in OVER], ids=lambda s: s.name.lower())
def test_every_living_transfer_can_be_abandoned(state: State, ending: Event) -> None:
    assert advance(state, ending) is State.ABANDONED


@pytest.mark.parametrize("state", sorted(OVER, key=lambda s: s.name), ids=lambda s: s.name.lower())
@pytest.mark.parametrize("event", list(Event), ids=lambda e: e.name.lower())
def test_what_is_over_stays_over(state: State, event: Event) -> None:
    assert advance(state, event) is state


def test_only_what_is_ready_can_land() -> None:
    can_land = {s for s, row in TRANSITIONS.items() if row.get(Event.COMPLETE) is State.LANDED and s not in OVER}
    assert can_land == {State.READY, State.STREAMING, State.SUSPENDED}
