"""The benchmark's exit code says whether the layer could do what it is timed at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernels.experts import bench, sweep


@pytest.mark.parametrize(
    ("name", "code"),
    [("ours, all to one", 1), ("torch", 0), (bench.PEER, 0), ("dense compiled", 0)],
)
def test_a_layer_of_ours_that_runs_out_of_memory_is_a_failure(
    name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    everything = {n: lambda: lambda: None for n in ("dense compiled", "ours", "torch")}
    decided = SimpleNamespace(state_TE=torch.ones(64, 4))
    for module, function, result in (
        (torch.cuda, "is_available", True),
        (torch.cuda, "get_device_name", "none"),
        (torch.cuda, "synchronize", None),
        (sweep, "compile_all", lambda: None),
        (bench, "base_case", None),
        (bench, "decide", decided),
        (bench, "variants", everything | {name: lambda: full}),
        (bench, "print_kernels", []),
    ):
        monkeypatch.setattr(module, function, lambda *_, result=result: result)
    row = {"ms": 1.0, "spread": 0.0, "host_ms": 1.0, "peak_gib": 1.0}
    monkeypatch.setattr(bench, "time_in_turns", lambda calls, _: dict.fromkeys(calls, row))
    assert bench.main(["--shapes", "64,4,16,16"]) == code
    assert f"{name}: left out: OutOfMemoryError" in capsys.readouterr().out
