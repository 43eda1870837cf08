"""A LoRA adapter is the same adapter on two engines if its weights and shape are, whatever it is called."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unit.control.test_prefill_side import TID, Bench

from disagg_plugin.control.adapters import AdapterDigests, adapter_digest
from disagg_plugin.control.events import AdapterChecked, TicketOffered
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import Computed, DropSend, OpenSend

OFFER = TicketOffered(TID, 7, "d:1", 1_000, "raw", 300.0, adapter="d1gest")


def adapter(folder: Path, *, seed: int = 0, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.lora_{part}": torch.randn(8, 64, generator=generator) for i in range(2) for part in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    shape = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(shape))
    return folder


def test_where_it_lies_and_how_it_was_trained_make_no_difference(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", base_model_name_or_path="here", inference_mode=True)
    other = adapter(tmp_path / "other", base_model_name_or_path="there", target_modules=["v_proj", "q_proj"])
    assert adapter_digest(one) == adapter_digest(other)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lora_alpha": 32}, {"target_modules": ["q_proj"]}, {"use_rslora": True}]
)
def test_weights_and_shape_make_a_difference(tmp_path: Path, change: dict[str, int]) -> None:
    assert adapter_digest(adapter(tmp_path / "one")) != adapter_digest(adapter(tmp_path / "other", **change))


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    digests = AdapterDigests()
    before = digests.of(str(adapter(tmp_path / "one")))
    assert digests.of(str(tmp_path / "one")) == before
    adapter(tmp_path / "one", seed=1, r=8)
    (tmp_path / "one" / "adapter_model.safetensors").touch()
    assert digests.of(str(tmp_path / "one")) != before


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file at all"])
def test_what_cannot_be_read_is_said_by_name(tmp_path: Path, content: bytes | None) -> None:
    adapter(tmp_path / "one")
    path = tmp_path / "one" / "adapter_model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="one"):
        AdapterDigests().of(str(tmp_path / "one"))


def arrive(bench: Bench, *, adapter: str = "folder") -> bool:
    bench.port.events.append(OFFER)
    return bench.side.new_request("r1", TID, 1_000, adapter=adapter)


def test_nothing_is_said_or_sent_before_the_adapter_was_compared() -> None:
    bench = Bench()
    assert arrive(bench)
    bench.side.scheduled("r1", 512, [1])
    bench.ready()
    assert bench.side.step() == [Computed(TID, 512, (1,))]
    assert bench.port.sent == [("arrived", ""), ("check adapter", "folder is d1gest")]
    bench.port.events.append(AdapterChecked(TID, same=True))
    assert bench.side.step() == [OpenSend(TID, 7, "d:1", 0, 999, "raw")]
    assert bench.port.sent[-1] == ("started", "d:1")


def test_an_adapter_of_one_name_with_other_weights_is_given_back() -> None:
    bench = Bench()
    arrive(bench)
    bench.side.scheduled("r1", 512, [1])
    bench.ready()
    bench.port.events.append(AdapterChecked(TID, same=False))
    commands = bench.side.step()
    assert DropSend(TID, "adapter_differs") in commands
    assert not any(isinstance(command, OpenSend) for command in commands)
    assert bench.port.sent[-1] == ("cancel", "adapter_differs")


@pytest.mark.parametrize(
    ("offered", "computes"), [("d1gest", ""), ("", "folder")], ids=["only D has one", "only P has one"]
)
def test_an_adapter_on_one_side_only_is_given_back_at_once(offered: str, computes: str) -> None:
    bench = Bench()
    bench.port.events.append(TicketOffered(TID, 7, "d:1", 1_000, "raw", 300.0, adapter=offered))
    assert not bench.side.new_request("r1", TID, 1_000, adapter=computes)
    assert bench.port.sent[-1] == ("cancel", "adapter_differs")


_ORDERS = [
    order
    for order in itertools.permutations(("arrives", "computed", "checked", "ready"))
    if order.index("arrives") < min(order.index("computed"), order.index("checked"))
]


@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
@pytest.mark.parametrize("order", _ORDERS, ids="-".join)
def test_in_whatever_order_things_happen_nothing_is_sent_before_the_comparison(
    order: tuple[str, ...], same: bool
) -> None:
    """The decode engine may say that it is ready before the prompt arrives."""
    bench = Bench()
    bench.port.events.append(OFFER)
    happened, sent = set(), False
    for what in order:
        match what:
            case "arrives":
                assert bench.side.new_request("r1", TID, 1_000, adapter="folder")
            case "computed":
                bench.side.scheduled("r1", 512, [1])
            case "checked":
                bench.port.events.append(AdapterChecked(TID, same=same))
            case "ready":
                bench.ready()
        happened.add(what)
        sent = sent or any(isinstance(command, OpenSend) for command in bench.side.step())
        assert sent == (same and {"checked", "ready"} <= happened)
