"""The yardstick sees what is wrong and names it, and `bench attention --check` says so."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.nsa import checks
from kernels.nsa.bench import main
from kernels.nsa.checks import CPU_CHECKS, SHORT, blocked, case_of, check_apart, check_one, naive
from kernels.nsa.naive import nsa_naive, select_naive
from kernels.nsa.selection import block_indices
from kernels.nsa.spec import NsaCall, NsaSpec
from kernels.nsa.triton_check import Case, compare, random_case

SPEC = NsaSpec(block=8, stride=4, select=16, selected=4, initial=1, local=2, window=24)
NAMES = (
    "q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates", "phi_k.weight",
    "phi_k.position", "phi_v.weight", "phi_v.position",
)  # fmt: skip
LENGTHS = [20, 100]


@pytest.fixture(scope="module")
def case() -> Case:
    return random_case(LENGTHS, 4, 2, 8, spec=SPEC, dtype=torch.float32, device="cpu")


def failures(case: Case, run: Callable[..., Tensor]) -> list[str]:
    """Names of what is off."""
    return [line.split(" ")[0].rstrip(":") for line in compare(case, run).failures()]


class _Gradient(torch.autograd.Function):
    """The identity, with another gradient: `change` of the right one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None


def poison(x: Tensor) -> Tensor:
    """NaN in one element, as memory that no kernel wrote."""
    x = x.clone()
    x.view(-1)[-1] = float("nan")
    return x


@pytest.mark.parametrize("run", [blocked, naive])
def test_right_implementations_pass(case: Case, run: Callable[..., Tensor]) -> None:
    assert failures(case, run) == []


@pytest.mark.parametrize("change", [lambda g: g * 1.01 + 1e-3, poison], ids=["wrong", "nan"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_gradient_is_named(
    case: Case, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    """One tensor passes through an identity whose gradient is off; nothing else may be blamed."""
    at = NAMES.index(name)
    # Gradients of φ's positions are compared with those of its weight, which are larger.
    more = (lambda g: g + 1.0) if name.endswith("position") and change is not poison else change

    def run(_: NsaCall, **options: Any) -> Tensor:
        tensors = list(case.tensors)
        tensors[at] = _Gradient.apply(tensors[at], more)
        return blocked(case.call(tensors), **options)

    report = compare(case, run)
    (line,) = report.failures()
    assert line.startswith(f"{name} {list(case.tensors[at].shape)}: error ")
    assert ("nan" in line) == (change is poison)


def test_a_wrong_output_is_named_and_so_is_nan(case: Case) -> None:
    out = [f"out [{sum(LENGTHS)}, 4, 8]"]
    for change in (lambda o: o * 1.001, poison):
        report = compare(case, lambda x, c=change, **k: _only_forward(blocked(x, **k), c))
        assert [line.split(":")[0] for line in report.failures()] == out


def _only_forward(out: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return out + (change(out.detach()) - out.detach())


def test_a_stolen_selection_is_named_although_its_output_is_right_for_it(case: Case) -> None:
    """The last query takes a less important block instead of the best free one."""

    def run(call: NsaCall, *, scale: float | None, stats: dict[str, Tensor]) -> Tensor:
        importance = nsa_naive(call, scale=scale).importance
        chosen = [select_naive(x, SPEC) for x in importance]
        last = importance[1][-1, 0].clone()
        free = torch.arange(len(last))
        free = free[(free >= SPEC.initial) & (free <= 99 // SPEC.select - SPEC.local)]
        best, worst = free[last[free].argmax()], free[last[free].argmin()]
        assert chosen[1][-1, 0, best] and not chosen[1][-1, 0, worst]
        chosen[1][-1, 0, best], chosen[1][-1, 0, worst] = False, True
        stats["selected_TGK"] = _indices(chosen)
        return nsa_naive(call, scale=scale, selection=chosen).out_THE.float()

    report = compare(case, run)
    (line,) = report.failures()
    assert line.startswith(f"selection [{sum(LENGTHS)}, 2, 4]: gives away importance ")
    assert report.failures(gap=10.0) == []


def _indices(chosen: list[Tensor]) -> Tensor:
    bases = [0, SPEC.selection_blocks(LENGTHS[0])]
    return torch.cat(
        [block_indices(x, base, SPEC.selected) for x, base in zip(chosen, bases, strict=True)]
    )


def _with_selection(change: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    def run(call: NsaCall, *, stats: dict[str, Tensor], **options: Any) -> Tensor:
        out = blocked(call, stats=stats, **options)
        change(stats["selected_TGK"])
        return out

    return run


def test_a_selection_without_a_forced_block_or_with_a_future_one_is_named(case: Case) -> None:
    def forget(selected_TGK: Tensor) -> None:
        selected_TGK[-1, 1, 0] = -1

    def foresee(selected_TGK: Tensor) -> None:
        selected_TGK[20, 0] = torch.tensor([3, -1, -1, -1])

    for change in (forget, foresee):
        assert "selection" in failures(case, _with_selection(change))


def test_a_block_of_another_document_and_a_wrong_shape_are_refused(case: Case) -> None:
    def steal(selected_TGK: Tensor) -> None:
        selected_TGK[-1, 0, 1] = 0

    with pytest.raises(ValueError, match="document at token 20 selected a stranger's block"):
        compare(case, _with_selection(steal))
    for change in (lambda o: o[:1], lambda o: o.double()):
        with pytest.raises(ValueError, match=r"out is torch\.float.* for q of torch\.float32"):
            compare(case, lambda x, c=change, **k: c(blocked(x, **k)))


def test_shared_and_strided_keys_are_compared_as_they_lie() -> None:
    for layout in ("shared", "model"):
        case = random_case(
            [60], 2, 1, 8, spec=SPEC, dtype=torch.float32, device="cpu", layout=layout
        )
        keys = case.tensors[1:7:2]
        assert (keys[0] is keys[1] is keys[2]) == (layout == "shared")
        assert [k.stride() for k in keys] == [(8 if layout == "shared" else 24, 8, 1)] * 3
        assert failures(case, blocked) == []
        assert failures(case, naive) == []
        # A shared key's gradient is the sum of the branches': one branch alone is too little.
        tensors = list(case.tensors)
        tensors[3] = _Gradient.apply(tensors[3], torch.zeros_like)
        lost = failures(case, lambda _, t=tensors, c=case, **k: blocked(c.call(t), **k))
        assert lost == (["k_cmp", "k_slc", "k_win"] if layout == "shared" else ["k_slc"])


def test_a_check_runs_apart_and_one_that_hangs_or_dies_has_failed() -> None:
    check = {**SHORT, "lengths": [70], "heads": 2, "groups": 1, "dim": 16, "dtype": "float32"}
    found = check_apart(check, "cpu")
    assert found["failures"] == [] and found["heads"] == 2
    assert check_apart(check, "cpu", seconds=0)["failures"] == ["no result after 0 s"]
    (line,) = check_apart({**check, "implementation": "magic"}, "cpu")["failures"]
    assert line == "KeyError: 'magic'"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run checks here: a process of their own loads torch, which takes longer than they do."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        check, device = json.loads(command[-1])
        found = json.dumps(check_one(check, device, {}))
        return subprocess.CompletedProcess(command, 0, found, "")

    monkeypatch.setattr(subprocess, "run", run)


OPTIONS = ["--check", "--workers", "1", "--heads", "6", "--groups", "2", "--dim", "8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would time")
def test_bench_checks_the_blocked_path_and_the_oracle_on_a_cpu(
    in_this_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*OPTIONS, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 checks passed" in out
    assert "the Triton kernels were not checked, nothing is timed" in out
    found = json.loads((tmp_path / "out.json").read_text())
    own, oracle, *_ = found["checks"]
    assert [x["implementation"] for x in (own, oracle)] == ["blocked", "naive"]
    assert (own["heads"], own["groups"], own["dim"]) == (6, 2, 8)
    assert all(len(x["errors"]) > 8 and x["failures"] == [] for x in found["checks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would time")
def test_bench_names_tensor_shape_and_error_and_returns_one(
    in_this_process: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(call: NsaCall, **options: Any) -> Tensor:
        q_THD = _Gradient.apply(call.q_THD, lambda g: g * 1.1)
        return blocked(call._replace(q_THD=q_THD), **options)

    monkeypatch.setattr(checks, "blocked", wrong)
    assert main(OPTIONS) == 1
    out = capsys.readouterr().out
    assert "1 of 4 checks passed" in out
    assert out.count("FAILED") == 3
    tokens = sum(SHORT["lengths"])
    assert f"\n  q [{tokens}, 6, 8]: error 1.000e-01, plain " in out


def test_every_check_can_be_drawn() -> None:
    for check in (*CPU_CHECKS, *checks.CHECKS):
        small = case_of({**check, "lengths": [3]}, "cpu")
        assert small.tensors[0].shape == (3, check["heads"], check["dim"])
    drawn = checks.checks_for(64, 4, 128, None, gpu=True)
    assert [x.get("implementation") for x in drawn[:3]] == ["triton", "blocked", None]
    assert [drawn[0][key] for key in ("heads", "groups", "dim")] == [64, 4, 128]
