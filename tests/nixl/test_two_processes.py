"""What must hold between two processes whatever the network or the other process does: no wrong byte, no leak."""

import signal

import pytest

from disagg_plugin.kv.wire import Kind, Notification

INT8_ERROR = 0.05  # amax / 127 / 2 and bf16 rounding, for noise of up to 5 sigma
LONG = 15_000  # tokens: more than 1,000 chunks


@pytest.mark.parametrize(("codec", "most_error"), [("raw", 0.0), ("int8", INT8_ERROR), ("int8c", INT8_ERROR)])
def test_a_request_arrives(pair, codec, most_error):
    transfer = pair.begin(300, codec=codec, first_token=24)
    transfer.wait_received()
    assert transfer.worst_error() <= most_error
    assert pair.decode.said("codecs")[-1] == [codec]
    assert pair.prefill.said("sent")[-1] == transfer.transfer_id


def test_a_thousand_chunks_through_four_slots(pair):
    before = pair.decode.counters()["chunks_received"]
    transfer = pair.begin(LONG)
    transfer.wait_received()
    assert transfer.worst_error() == 0.0
    assert pair.decode.counters()["chunks_received"] - before >= 1000


@pytest.mark.parametrize(
    ("fault", "asked_again"),
    [("corrupt", 1), ("truncate", 1), ("short", 1), ("stale", None), ("replay", 0), ("other_slot", 0)],
)
@pytest.mark.parametrize(("codec", "most_error"), [("raw", 0.0), ("int8", INT8_ERROR)])
def test_one_fault_costs_a_chunk_at_most(pair, fault, asked_again, codec, most_error):
    nacks = pair.decode.counters()["nacks"]
    pair.prefill.ask("faults", names=["", fault])
    transfer = pair.begin(200, codec=codec)
    transfer.wait_received()
    assert transfer.worst_error() <= most_error
    if asked_again is not None:
        assert pair.decode.counters()["nacks"] - nacks == asked_again


def test_a_chunk_that_is_damaged_twice_costs_the_transfer(pair):
    pair.prefill.ask("faults", names=[], all_corrupt=True)
    transfer = pair.begin(10)  # one chunk
    assert transfer.wait_failed("d") == "bad_chunk"
    assert transfer.wait_failed("p") == "bad_chunk"
    assert transfer.abandon() == transfer.decode_blocks[:2]
    pair.prefill.ask("faults", names=[])


def test_writes_of_aborted_transfers_land_in_slots_that_serve_others(pair):
    pair.prefill.ask("faults", names=["", "stale"] * 150)
    before = pair.decode.counters()["nacks"]
    transfer = pair.begin(3_000)
    transfer.wait_received()
    assert transfer.worst_error() == 0.0
    assert pair.decode.counters()["nacks"] > before  # some did land before D had copied the slot


def test_nonsense_from_a_known_agent_is_counted(pair):
    before = pair.decode.counters()
    agent = pair.decode.ask("endpoint")["agent_name"]
    unknown = Notification(Kind.CHUNK, slot=1, sequence=0, attempt=0, nonce=0xBAD, nbytes=4096)
    pair.prefill.ask("notify", peer=agent, message=b"garbage".hex())
    pair.prefill.ask("notify", peer=agent, message=unknown.pack().hex())
    transfer = pair.begin(2_000)  # the prefill side's thread sleeps until it has something to do
    transfer.wait_received()
    assert transfer.worst_error() == 0.0
    pair.assert_nothing_leaks()
    after = pair.decode.counters()
    assert after["unparsable"] - before["unparsable"] == 1
    assert after["foreign"] - before["foreign"] == 1


def landed_prefix(transfer, invalid):
    """First token that D must compute itself."""
    return transfer.decode_blocks.index(invalid[0]) * 8 if invalid else transfer.tokens


def begin_and_wait_for_chunks(pair, chunks=50):
    before = pair.decode.counters()["chunks_received"]
    transfer = pair.begin(LONG)
    pair.eventually(lambda: pair.decode.counters()["chunks_received"] > before + chunks, "a transfer under way")
    return transfer


def assert_next_one_works(pair):
    transfer = pair.begin(500)
    transfer.wait_received()
    assert transfer.worst_error() == 0.0


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_side_that_stops_beyond_every_deadline_and_wakes_up(own_pair, side):
    pair = own_pair
    stopped, other = (pair.prefill, pair.decode) if side == "p" else (pair.decode, pair.prefill)
    transfer = begin_and_wait_for_chunks(pair)
    stopped.signal(signal.SIGSTOP)
    assert transfer.wait_failed("d" if side == "p" else "p") == "stalled"
    if side == "p":
        invalid = transfer.abandon()
        assert invalid
        assert transfer.worst_error(end=landed_prefix(transfer, invalid)) == 0.0
        pair.decode.ask("fill", block_ids=transfer.decode_blocks, seed=999, tokens=transfer.tokens)
    stopped.signal(signal.SIGCONT)
    if side == "p":
        assert transfer.wait_failed("p") in ("stalled", "discarded")
        foreign = pair.decode.ask(
            "worst_error",
            block_ids=transfer.decode_blocks,
            seed=999,
            start=0,
            end=transfer.tokens,
            tokens=transfer.tokens,
        )
        assert foreign == 0.0, "an abandoned request's blocks belong to somebody else"
    else:
        assert transfer.wait_failed("d") == "stalled"
        invalid = transfer.abandon()
        assert transfer.worst_error(end=landed_prefix(transfer, invalid)) == 0.0
    assert other.process.poll() is None
    assert_next_one_works(pair)


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_side_that_is_killed_comes_back_with_a_new_epoch(own_pair, side):
    pair = own_pair
    transfer = begin_and_wait_for_chunks(pair)
    (pair.prefill if side == "p" else pair.decode).kill()
    if side == "p":
        assert transfer.wait_failed("d") in ("stalled", "peer_lost")
        invalid = transfer.abandon()
        assert transfer.worst_error(end=landed_prefix(transfer, invalid)) == 0.0
    else:
        assert transfer.wait_failed("p") in ("peer_lost", "transport", "stalled")
    pair.replace(side, pair.successor(side))
    assert_next_one_works(pair)


def test_a_restart_before_anyone_noticed_fails_what_was_open(own_pair):
    pair = own_pair
    successor = pair.successor("p")
    transfer = begin_and_wait_for_chunks(pair)
    pair.replace("p", successor)
    assert transfer.wait_failed("d") in ("peer_restarted", "peer_lost")
    transfer.abandon()
    assert_next_one_works(pair)


def test_an_abort_on_d_frees_everything_on_both_sides(own_pair):
    pair = own_pair
    transfer = begin_and_wait_for_chunks(pair)
    invalid = transfer.abandon()
    assert transfer.worst_error(end=landed_prefix(transfer, invalid)) == 0.0
    assert transfer.wait_failed("p") == "discarded"
    assert_next_one_works(pair)


def test_a_drop_on_p_frees_everything_on_both_sides(own_pair):
    pair = own_pair
    transfer = begin_and_wait_for_chunks(pair)
    released = {"transfer_id": transfer.transfer_id, "request_id": "prefill-request"}
    pair.prefill.apply(("ReleaseWhenStaged", released))
    assert pair.prefill.said("released") == []
    pair.prefill.apply(("DropSend", {"transfer_id": transfer.transfer_id, "reason": "test"}))
    assert pair.eventually(lambda: pair.prefill.said("released"), "blocks released") == ["prefill-request"]
    assert transfer.wait_failed("d") == "stalled"
    transfer.abandon()
    assert_next_one_works(pair)


def test_an_agent_that_nobody_introduced_is_not_heard(own_pair):
    pair = own_pair
    stranger = pair.start("stranger", 1)
    try:
        assert stranger.reply() == "ready"
        region = {"region_first_slot": 8, "region_slots": 4, "receives": False}
        endpoint = pair.decode.ask("endpoint")
        stranger.apply(("AddPeer", {"peer": "d", "epoch": 1, "endpoints": (endpoint,)} | region))
        ids = {"transfer_id": bytes(15).hex() + "01", "nonce": 0x9E3779B97F4A7C15}
        transfer = begin_and_wait_for_chunks(pair, chunks=5)  # number 1: the stranger knows its ticket
        assert transfer.nonce == ids["nonce"]
        stranger.apply(
            ("OpenSend", ids | {"peer": "d", "codec": "raw", "first_token": 0, "end_token": 2_000}),
            ("Computed", {"transfer_id": ids["transfer_id"], "computed_tokens": 2_000, "block_ids": list(range(125))}),
        )
        transfer.wait_received()
        assert transfer.worst_error() == 0.0
        assert_next_one_works(pair)
    finally:
        stranger.kill()
    pair.eventually(lambda: pair.decode.counters()["foreign"] > 0, "the stranger's chunks refused")
