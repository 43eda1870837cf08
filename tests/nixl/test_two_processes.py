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
    pair.prefill.ask("faults", names=["corrupt"] * 40)
    transfer = pair.begin(10)  # one chunk
    assert transfer.wait_failed("d") == "bad_chunk"
    assert transfer.wait_failed("p") == "bad_chunk"
    assert transfer.abandon() == transfer.decode_blocks[:2]
    pair.prefill.ask("faults", names=[])


def test_writes_of_aborted_transfers_land_in_slots_that_serve_others(pair):
    pair.prefill.ask("faults", names=["", "stale"] * 100)
    transfer = pair.begin(3_000)
    transfer.wait_received()
    assert transfer.worst_error() == 0.0


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
