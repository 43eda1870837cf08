"""Profiler ranges: seen by torch.profiler and by NVTX where torch has CUDA, and otherwise next to nothing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from disagg_plugin.observability.ranges import profile_range


def test_torch_profiler_shows_the_range():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with profile_range("disagg encode"):
            torch.ones(10).sum()
        with pytest.raises(ValueError, match="within"), profile_range("disagg decode"):
            raise ValueError("within")
    names = {event.key for event in profiler.key_averages()}
    assert {"disagg encode", "disagg decode"} <= names


def test_ranges_are_pushed_and_popped_for_nvtx_where_torch_has_cuda(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    nvtx = SimpleNamespace(range_push=calls.append, range_pop=lambda: calls.append("pop"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    with profile_range("outer"), profile_range("inner"):
        calls.append("work")
    assert calls == ["outer", "inner", "work", "pop", "pop"]


def test_without_a_listener_it_is_the_same_empty_context():
    assert profile_range("a") is profile_range("b")


def test_a_process_without_torch_stays_without_it():
    code = "import sys; from disagg_plugin.observability.ranges import profile_range\n"
    code += "with profile_range('x'): pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
