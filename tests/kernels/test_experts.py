"""Expert feed-forward: both fast forms equal the oracle, whatever the routing looks like."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.experts import SurpriseSpec, expert_ffn, inner_width
from kernels.experts.naive import expert_ffn_naive

NAMES = ("x", "w_in", "w_out", "z", "delta")


@dataclass
class Case:
    """Tensors of one call; the leaves are in the order of NAMES."""

    leaves: list[Tensor]
    fired: Tensor
    explored: Tensor | None
    grad: Tensor
    activation: str
    max_fired: int

    def to(self, dtype: torch.dtype) -> "Case":
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        return Case(
            leaves, self.fired, self.explored, self.grad.to(dtype), self.activation, self.max_fired
        )


def make(
    fired: Tensor,
    explored: Tensor | None = None,
    activation: str = "swiglu",
    width: int = 16,
    hidden: int = 24,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    tokens, experts = fired.shape

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    leaves = [
        draw(tokens, width),
        draw(experts, inner_width(activation, hidden), width, std=width**-0.5),
        draw(experts, width, hidden, std=hidden**-0.5),
        draw(tokens, experts),
        draw(tokens, hidden, std=0.3),
    ]
    grad = draw(tokens, width, std=1e-3)
    most = max(int(fired.sum(1).max()), 1)
    return Case([x.requires_grad_() for x in leaves], fired, explored, grad, activation, most)


def random_fired(tokens: int, experts: int, most: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Between 1 and `most` experts for each token, and one more explored for every third."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=g).argsort(1)
    count = torch.randint(1, most + 1, (tokens, 1), generator=g)
    fired = order < count
    explored = (order == count) & (torch.arange(tokens) % 3 == 0)[:, None]
    return fired, explored


def run(
    case: Case,
    implementation: str,
    spec: SurpriseSpec | None = None,
    loss_scale: float = 1e-3,
    scaled: bool = True,
    **extra: object,
) -> tuple[Tensor, list[Tensor | None]]:
    x, w_in, w_out, z, delta = case.leaves
    p = torch.where(case.fired, z, -torch.inf).softmax(1)
    common = dict(
        activation=case.activation,
        hidden_delta_TF=delta if scaled else None,
        surprise=spec,
        z_TE=z,
        loss_scale=torch.tensor(loss_scale, dtype=z.dtype),
        explored_TE=case.explored,
    )
    if implementation == "naive":
        y = expert_ffn_naive(x, w_in, w_out, p, case.fired, **common)
    else:
        y = expert_ffn(
            x, w_in, w_out, p, case.fired, **common, max_fired=case.max_fired,
            max_explored=0 if case.explored is None else int(case.explored.sum()) + 3,
            implementation=implementation, **extra,
        )  # fmt: skip
    grads = torch.autograd.grad(y, case.leaves, case.grad, allow_unused=True)
    return y.detach(), list(grads)


def compare(case: Case, implementation: str, spec: SurpriseSpec | None, **kw: object) -> None:
    exact = implementation == "loop"
    y_ref, grads_ref = run(case, "naive", spec, **kw)
    y, grads = run(case if exact else case.to(torch.float32), implementation, spec, **kw)
    tolerance = {"rtol": 1e-10, "atol": 1e-15} if exact else {"rtol": 2e-4, "atol": 2e-7}
    torch.testing.assert_close(
        y.double(), y_ref, **{**tolerance, "atol": 1e-5 if not exact else 1e-12}
    )
    for name, ours, theirs in zip(NAMES, grads, grads_ref, strict=True):
        if theirs is None or ours is None:
            assert theirs is None and ours is None, name
            continue
        torch.testing.assert_close(
            ours.double(), theirs, **tolerance, msg=lambda m, name=name: f"d{name}: {m}"
        )


SPEC = SurpriseSpec(temperature=0.7, ce_weight=0.3, coefficient=0.5)
FORMS = ("loop", "grouped")


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("scaled", [True, False])
def test_output_and_all_gradients_equal_the_oracle(implementation, activation, scaled):
    fired, explored = random_fired(13, 6, 4)
    compare(make(fired, explored, activation), implementation, SPEC, scaled=scaled)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    "spec",
    [
        None,
        SurpriseSpec(kind="output_grad", coefficient=0.5),
        SurpriseSpec(gated=False, coefficient=0.5),
        SurpriseSpec(normalise="none", coefficient=0.5, kl_weight=0.5, ce_weight=0.0),
    ],
)
def test_every_kind_of_surprise_equals_the_oracle(implementation, spec):
    fired, explored = random_fired(9, 5, 3)
    compare(make(fired, explored), implementation, spec)


def _all_on_one() -> Tensor:
    fired = torch.zeros(7, 4, dtype=torch.bool)
    fired[:, 2] = True
    return fired


def _all_on_all() -> Tensor:
    return torch.ones(5, 4, dtype=torch.bool)


def _single_token() -> Tensor:
    return torch.tensor([[False, True, False, True]])


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("build", [_all_on_one, _all_on_all, _single_token])
def test_skewed_routing_equals_the_oracle(implementation, build):
    compare(make(build()), implementation, SPEC)


@pytest.mark.parametrize("implementation", FORMS)
def test_an_idle_expert_gets_zero_weight_gradients(implementation):
    case = make(_all_on_one()).to(torch.float32)
    _, grads = run(case, implementation, SPEC)
    for grad in grads[1:3]:
        idle = grad[[0, 1, 3]]
        assert torch.equal(idle, torch.zeros_like(idle))


@pytest.mark.parametrize("implementation", FORMS)
def test_no_tokens_at_all_give_empty_output_and_zero_weight_gradients(implementation):
    case = make(torch.zeros(1, 4, dtype=torch.bool)).to(torch.float32)
    x, w_in, w_out, z, delta = case.leaves
    empty = torch.zeros(0, 4)
    z = empty.clone().requires_grad_()
    y = expert_ffn(
        x[:0], w_in, w_out, empty, empty.bool(), activation="swiglu", max_fired=2,
        hidden_delta_TF=delta[:0], surprise=SPEC, z_TE=z, loss_scale=torch.tensor(1.0),
        explored_TE=empty.bool(), max_explored=1, implementation=implementation,
    )  # fmt: skip
    assert y.shape == (0, 16)
    grads = torch.autograd.grad(y.sum(), (x, w_in, w_out, z, delta))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeating_a_call_is_bitwise_equal(implementation, dtype):
    fired, explored = random_fired(65, 8, 3)
    case = make(fired, explored).to(torch.float32)
    case.leaves = [
        leaf.detach().to(torch.float32 if name == "z" else dtype).requires_grad_()
        for name, leaf in zip(NAMES, case.leaves, strict=True)
    ]
    case.grad = case.grad.to(dtype)
    y_1, grads_1 = run(case, implementation, SPEC)
    y_2, grads_2 = run(case, implementation, SPEC)
    assert y_1.dtype == dtype
    assert torch.equal(y_1, y_2)
    assert all(torch.equal(a, b) for a, b in zip(grads_1, grads_2, strict=True))


@pytest.mark.parametrize("implementation", FORMS)
def test_bf16_stays_near_the_oracle(implementation):
    fired, explored = random_fired(33, 6, 3)
    case = make(fired, explored)
    half = case.to(torch.bfloat16)
    half.leaves[3] = case.leaves[3].detach().float().requires_grad_()
    # The oracle gets what bf16 could represent.
    rounded = Case(
        [leaf.detach().double().requires_grad_() for leaf in half.leaves],
        fired, explored, half.grad.double(), case.activation, case.max_fired,
    )  # fmt: skip
    y_ref, grads_ref = run(rounded, "naive", SPEC)
    y, grads = run(half, implementation, SPEC)
    for ours, theirs in zip([y, *grads], [y_ref, *grads_ref], strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 0.02, error


@pytest.mark.parametrize("implementation", FORMS)
def test_explored_pairs_change_neither_output_nor_weight_gradients(implementation):
    fired, explored = random_fired(40, 8, 3)
    case = make(fired, explored)
    dtype = torch.float64 if implementation == "loop" else torch.float32
    with_, grads_with = run(case.to(dtype), implementation)
    case.explored = None
    without, grads_without = run(case.to(dtype), implementation)
    torch.testing.assert_close(with_, without, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(grads_with[:3], grads_without[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_padding_beyond_the_last_offset_may_hold_anything(monkeypatch):
    """On a GPU grouped_mm leaves the rows of the tail undefined; here they are made NaN."""
    fired, explored = random_fired(20, 6, 4)
    case = make(fired, explored).to(torch.float32)
    expected = run(case, "grouped", SPEC)
    plain = torch.nn.functional.grouped_mm

    def poisoned(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = plain(a, b, offs=offs)
        if b.dim() == 3:
            out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    y, grads = run(case, "grouped", SPEC)
    assert torch.equal(y, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_the_grouped_form_never_reads_the_device(monkeypatch):
    """Meta tensors have no values: whatever needs one fails (grouped_mm itself excepted)."""

    def shape_only(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        if b.dim() == 3:
            return a.new_empty(a.shape[0], b.shape[2])
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", shape_only)
    fired, explored = random_fired(20, 6, 4)
    case = make(fired, explored).to(torch.float32)
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in case.leaves]
    x, w_in, w_out, z, delta = leaves
    stats: dict[str, Tensor] = {}
    y = expert_ffn(
        x, w_in, w_out, torch.empty(20, 6, device="meta"), fired.to("meta"), activation="swiglu",
        max_fired=4, hidden_delta_TF=delta, surprise=SPEC, z_TE=z, stats=stats, max_explored=7,
        loss_scale=torch.empty((), device="meta"), explored_TE=explored.to("meta"),
        counts_X=torch.zeros(7, dtype=torch.int64, device="meta"),
    )  # fmt: skip
    torch.autograd.grad(y, leaves, torch.empty(20, 16, device="meta"))
    assert stats


def test_a_strided_upstream_gradient_is_taken():
    fired, _ = random_fired(12, 4, 2)
    case = make(fired).to(torch.float32)
    x, w_in, w_out, z, _ = case.leaves
    p = torch.where(fired, z, -torch.inf).softmax(1)
    for implementation in FORMS:
        y = expert_ffn(
            x, w_in, w_out, p, fired, activation="swiglu", max_fired=2,
            implementation=implementation,
        )  # fmt: skip
        whole = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
        strided = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        assert torch.equal(whole, strided)


def test_bad_inputs_are_named():
    case = make(_single_token(), width=12, hidden=20).to(torch.bfloat16)
    x, w_in, w_out, z, _ = case.leaves
    p = torch.where(case.fired, z.float(), -torch.inf).softmax(1)
    call = {"activation": "swiglu", "max_fired": 2}
    with pytest.raises(ValueError, match="multiples of 8"):
        expert_ffn(x, w_in, w_out, p, case.fired, **call, implementation="grouped")
    with pytest.raises(ValueError, match="w_in"):
        expert_ffn(x, w_in[:, :5], w_out, p, case.fired, **call)
    with pytest.raises(ValueError, match="loss_scale"):
        expert_ffn(x, w_in, w_out, p, case.fired, **call, surprise=SPEC)
    with pytest.raises(ValueError, match="implementation"):
        expert_ffn(x, w_in, w_out, p, case.fired, **call, implementation="fast")
    with pytest.raises(ValueError, match="activation"):
        expert_ffn(x, w_in, w_out, p, case.fired, activation="gelu", max_fired=2)
    with pytest.raises(ValueError, match="temperature"):
        SurpriseSpec(temperature=0.0)
