"""Surprise: the closed form is per-sample autograd, and the router's lesson is free of scales."""

import pytest
import torch
from torch import Tensor

from kernels.experts import SurpriseSpec, expert_ffn, inner_width
from kernels.experts.naive import router_loss_naive, surprise_naive
from kernels.experts.surprise import router_lesson, router_loss

T, E, C, F = 11, 5, 12, 16


def problem(activation: str = "swiglu", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    z = draw(T, E)
    count = torch.randint(1, 4, (T, 1), generator=g)
    fired = z.argsort(1).argsort(1) < count
    return {
        "x": draw(T, C).requires_grad_(),
        "w_in": draw(E, inner_width(activation, F), C).requires_grad_(),
        "w_out": draw(E, C, F).requires_grad_(),
        "z": z.requires_grad_(),
        "fired": fired,
        "p": torch.where(fired, z.detach(), -torch.inf).softmax(1),
        "g": draw(T, C),
    }


def call(
    a: dict[str, Tensor], spec: SurpriseSpec, activation: str = "swiglu", **kw: object
) -> Tensor:
    return expert_ffn(
        a["x"], a["w_in"], a["w_out"], a["p"], a["fired"], z_TE=a["z"], surprise=spec,
        activation=activation, max_fired=3, **{"loss_scale": torch.tensor(1.0), **kw},
    )  # fmt: skip


def oracle(a: dict[str, Tensor], run: Tensor, kind: str, activation: str = "swiglu") -> Tensor:
    return surprise_naive(
        a["x"], a["w_in"], a["w_out"], a["p"], run, a["g"], activation, None, kind
    )


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("kind", ["param_grad", "output_grad"])
def test_surprise_is_the_norm_of_each_pairs_own_gradient(activation, kind):
    a = problem(activation)
    S = oracle(a, a["fired"], kind, activation)
    stats: dict[str, Tensor] = {}
    call(a, SurpriseSpec(kind=kind), activation, stats=stats).backward(a["g"])
    mean_E = S.sum(0) / a["fired"].sum(0)
    torch.testing.assert_close(stats["expert_surprise"], mean_E, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(stats["surprise"], S[a["fired"]].mean(), rtol=1e-10, atol=0.0)
    # One token alone shows every single value.
    for t in range(T):
        one = {k: v[t : t + 1].detach() if len(v) == T else v for k, v in a.items()}
        one["z"].requires_grad_()
        call(one, SurpriseSpec(kind=kind), activation, stats=stats).backward(a["g"][t : t + 1])
        ran = a["fired"][t]
        torch.testing.assert_close(stats["expert_surprise"][ran], S[t, ran], rtol=1e-10, atol=0.0)
        assert torch.isnan(stats["expert_surprise"][~ran]).all()


def test_the_norm_of_p_g_says_nothing_about_the_expert():
    """The seed's surprise |dL/d(expert output)|, over all experts: why it is not the default."""
    a = problem()
    everyone = torch.ones(T, E, dtype=torch.bool)
    S = oracle(a, everyone, "output_grad")
    best = S.argmin(1)
    # Its arg-min is an expert that did not fire, which costs nothing because it did nothing.
    assert not a["fired"].gather(1, best[:, None]).any()
    # Among those that fired it only ranks their gate, ...
    fired_p = torch.where(a["fired"], a["p"], torch.inf)
    fired_S = torch.where(a["fired"], S, torch.inf)
    assert torch.equal(fired_S.argmin(1), fired_p.argmin(1))
    # ... and it does not change when every expert becomes another one; param_grad does.
    other = a | {"w_in": torch.randn_like(a["w_in"]), "w_out": torch.randn_like(a["w_out"])}
    assert torch.allclose(oracle(other, everyone, "output_grad"), S)
    ours, others = oracle(a, a["fired"], "param_grad"), oracle(other, a["fired"], "param_grad")
    assert not torch.allclose(ours, others)


@pytest.mark.parametrize("spec", [SurpriseSpec(), SurpriseSpec(normalise="none", ce_weight=0.7)])
def test_lesson_gradient_is_that_of_the_loss(spec):
    a = problem()
    S = oracle(a, a["fired"], "param_grad")
    lesson = router_lesson(S, a["z"].detach(), a["fired"], spec)
    loss_T = router_loss_naive(S, a["z"], a["fired"], spec)
    (dz,) = torch.autograd.grad(loss_T.sum(), a["z"])
    torch.testing.assert_close(lesson.grad_TE, dz, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(router_loss(lesson, spec), loss_T.detach(), rtol=1e-10, atol=1e-12)


def test_tokens_with_one_expert_or_without_gradient_teach_nothing():
    z, run = torch.randn(4, 3), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    S = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 2, 3], [torch.inf, 1, 0]])
    lesson = router_lesson(S, z, run, SurpriseSpec())
    assert lesson.counted_T.tolist() == [False, False, True, False]
    assert torch.equal(lesson.grad_TE[[0, 1, 3]], torch.zeros(3, 3))
    assert lesson.grad_TE[2].abs().sum() > 0
    assert torch.isfinite(router_loss(lesson, SurpriseSpec())).all()


@pytest.mark.parametrize("normalise", ["mean", "none"])
def test_the_lesson_does_not_depend_on_the_scale_of_the_loss(normalise):
    """Loss scaling, token mean and accumulation multiply g and loss_scale alike."""
    a = problem()
    spec = SurpriseSpec(normalise=normalise, coefficient=0.1)

    def per_token(scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        stats: dict[str, Tensor] = {}
        y = call(a, spec, loss_scale=torch.tensor(scale), stats=stats)
        (dz,) = torch.autograd.grad(y, a["z"], a["g"] * scale)
        return dz / scale, stats

    dz_1, stats_1 = per_token(1.0)
    assert dz_1.abs().max() > 0
    for scale in (2.0**-14, 2.0**16):
        dz, stats = per_token(scale)
        torch.testing.assert_close(dz, dz_1, rtol=1e-9, atol=0.0)
        for name, value in stats.items():
            torch.testing.assert_close(value, stats_1[name], rtol=1e-6, atol=0.0, equal_nan=True)


def test_micro_batches_add_up_to_the_whole_batch():
    a = problem()
    spec = SurpriseSpec(coefficient=0.1)
    (whole,) = torch.autograd.grad(call(a, spec), a["z"], a["g"])
    parts = []
    for lo, hi in ((0, 4), (4, 5), (5, T)):
        part = {k: v[lo:hi] if len(v) == T else v for k, v in a.items()}
        parts.append(torch.autograd.grad(call(part, spec), a["z"], part["g"])[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-9, atol=1e-12)


def test_stats_and_counts_are_written_by_the_backward_only():
    a = problem()
    stats: dict[str, Tensor] = {}
    counts = torch.zeros(E + 1, dtype=torch.int64)
    y = call(a, SurpriseSpec(), stats=stats, counts_X=counts)
    assert not stats
    assert not counts.any()
    y.backward(a["g"])
    assert set(stats) == {"expert_surprise", "surprise", "router_loss", "agreement"}
    assert counts.tolist() == [*a["fired"].sum(0).tolist(), T]
    assert all(not value.requires_grad for value in stats.values())
