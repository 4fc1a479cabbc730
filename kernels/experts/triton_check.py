"""Random layers, and the comparison of the Triton layer with the torch one in fp64.

Used by the tests (in Triton's interpreter and on a GPU) and by `tiny-onn bench experts --check`.
The reference takes the decisions that Triton made, after they have been checked against fp64
logits: next to a threshold either answer is right, and everything behind it depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.experts.activation import Activation, inner_width
from kernels.experts.api import Implementation as Products
from kernels.experts.layer import Router, logits, run_decided
from kernels.experts.router import explore, fire
from kernels.experts.spec import LayerSpec, ProductTiles, RouteSpec
from kernels.experts.surprise import SurpriseSpec
from kernels.experts.triton_layer import dynmoe_triton, route
from kernels.experts.triton_route import Routing

FIRST = 101
"""Index of the first token; only exploration looks at it."""

LEAVES = ("x", "direction", "log_tau", "theta", "w_in", "w_out", "delta")


class Case(NamedTuple):
    """A layer with its input; the leaves are in the order of LEAVES (delta may be missing).

    Attributes:
        leaves: tensors that get gradients.
        bias_E: the controller's bias.
        step_1: shifts exploration.
        loss_scale: 0-dim.
        grad_TC: upstream gradient.
        spec: what the layer does.
    """

    leaves: list[Tensor]
    bias_E: Tensor
    step_1: Tensor
    loss_scale: Tensor
    grad_TC: Tensor
    spec: LayerSpec

    def router(self, leaves: list[Tensor]) -> Router:
        """Return the router of (a copy of) the leaves."""
        return Router(leaves[1], leaves[2], leaves[3], self.bias_E, self.step_1, FIRST)


def random_case(
    tokens: int,
    experts: int,
    width: int,
    hidden: int,
    *,
    activation: Activation = "swiglu",
    most: int = 4,
    fewest: int = 1,
    mean: float = 2.0,
    stride: int = 0,
    sequence: int = 0,
    scaled: bool = False,
    surprise: SurpriseSpec | None = None,
    surrogate_width: float = 1.0,
    bias_weighs: bool = True,
    favour: int | None = None,
    closed: int = 0,
    products: ProductTiles | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Draw a layer whose tokens fire about `mean` experts; `favour` sends all to that one.

    The last `closed` experts do not exist yet.
    """
    # On the device itself: a host takes seconds for half a billion numbers.
    g = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * std).to(kind)

    leaves = [
        draw(tokens, width),
        draw(experts, width),
        draw(1, std=0.1),
        draw(experts, std=0.1),
        draw(experts, inner_width(activation, hidden), width, std=width**-0.5),
        draw(experts, width, hidden, std=hidden**-0.5),
    ]
    if scaled:
        leaves.append(draw(tokens, hidden, std=0.3))
    share = min(mean / experts, 0.999)
    theta_0 = float(torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64)))
    bias_E = draw(experts, std=0.1, kind=torch.float32)
    if favour is not None:
        bias_E += 100.0
        bias_E[favour] -= 200.0
    if closed:
        bias_E[-closed:] = 1e4
    spec = LayerSpec(
        activation=activation,
        route=RouteSpec(width**0.5, theta_0, fewest, most, bias_weighs, stride, sequence),
        surprise=surprise,
        surrogate_width=surrogate_width,
        products=products or ProductTiles(),
    )
    return Case(
        [leaf.requires_grad_() for leaf in leaves],
        bias_E,
        torch.tensor([3], device=device),
        torch.tensor(1e-3, device=device),
        draw(tokens, width, std=1e-3),
        spec,
    )


def wrong_decisions(case: Case, routing: Routing, tolerance: float) -> list[str]:
    """What is wrong with the choice of experts and with the list of pairs."""
    x, E = case.leaves[0].detach(), case.leaves[1].shape[0]
    T, spec = x.shape[0], case.spec.route
    router = case.router([leaf.detach().double() for leaf in case.leaves])
    z, biased = logits(x.double(), router, case.spec)
    fired = routing.state_TE == 1
    bad = []
    ranked = biased.sort(1, descending=True).values
    edges = [torch.zeros(T, 1, device=x.device, dtype=z.dtype)]
    for k in {min(spec.most, E), min(spec.most + 1, E), spec.fewest, min(spec.fewest + 1, E)}:
        edges.append(ranked[:, k - 1 : k])
    margin = (biased[:, :, None] - torch.cat(edges, 1)[:, None, :]).abs()
    # An expert's own value is one of the edges: the nearest other one counts.
    own = margin.sort(2).values
    near = (own[:, :, 0] < tolerance) & ((own[:, :, 0] > 0) | (own[:, :, 1] < tolerance))
    if ((fire(biased, spec.fewest, spec.most) != fired) & ~near).any():
        bad.append("fired experts are not those of the thresholds")
    if not torch.allclose(routing.z_TE.double(), z, rtol=tolerance, atol=tolerance):
        bad.append(f"z is off by {float((routing.z_TE.double() - z).abs().max()):.2e}")
    explored = routing.state_TE == 2
    wanted = torch.zeros_like(explored)
    if spec.stride:
        wanted = explore(biased, fired, router.step_1, spec.stride, router.first, spec.sequence)
    if not torch.equal(explored, wanted):
        bad.append("not exactly the chosen tokens explore the chosen expert each")
    p = torch.softmax(torch.where(fired, routing.z_TE.double(), -torch.inf), 1)
    if not torch.allclose(routing.p_TE.double(), p, rtol=1e-5, atol=1e-6):
        bad.append("p is not the softmax over the fired experts")
    return bad + _wrong_pairs(routing)


def _wrong_pairs(r: Routing) -> list[str]:
    runs = r.state_TE > 0
    T, E = runs.shape
    bad = []
    start = 0
    for e in range(E):
        token = runs[:, e].nonzero()[:, 0]
        rows = r.token_P[start : int(r.ends_E[e])]
        if not torch.equal(rows[: len(token)].long(), token) or (rows[len(token) :] != -1).any():
            bad.append(f"the rows of expert {e} are not its tokens in order")
        gates = r.gate_P[start : int(r.ends_E[e])]
        if not torch.equal(gates[: len(token)], r.p_TE[token, e]) or gates[len(token) :].any():
            bad.append(f"the gates of expert {e} are not those of its tokens")
        where = torch.arange(start, start + len(token), device=token.device)
        if not torch.equal(r.place_TE[token, e].long(), where):
            bad.append(f"place of expert {e}")
        start = int(r.ends_E[e])
    if (r.place_TE[~runs] != -1).any():
        bad.append("place of pairs that do not run")
    for t in range(T):
        experts = runs[t].nonzero()[:, 0]
        slots, gates = r.slot_TK[t], r.gate_TK[t]
        n = len(experts)
        if not torch.equal(slots[:n], r.place_TE[t, experts]) or (slots[n:] != -1).any():
            bad.append(f"slots of token {t}")
        if not torch.equal(gates[:n], r.p_TE[t, experts]) or gates[n:].any():
            bad.append(f"gates of token {t}")
    return bad[:5]


@dataclass
class Report:
    """Relative errors (of norms) by name, ours and those of the plain torch layer beside them."""

    decisions: list[str]
    ours: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)

    def failures(self, gap: float, floor: float) -> list[str]:
        """Name what is wrong: errors above `gap` times the plain ones and above `floor`."""
        return self.decisions + [
            f"{name}: error {error:.2e}, plain {self.plain[name]:.2e}"
            for name, error in self.ours.items()
            if not error <= max(floor, gap * self.plain[name])
        ]


def _reference(
    case: Case, routing: Routing, dtype: torch.dtype, products: Products
) -> list[Tensor]:
    # As the leaves are: what a narrower type rounded away is nobody's error.
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
    z, _ = logits(leaves[0], case.router(leaves), case.spec)
    explored = routing.state_TE == 2 if case.spec.route.stride else None
    stats: dict[str, Tensor] = {}
    y = run_decided(
        leaves[0], leaves[4], leaves[5], z, routing.state_TE == 1, explored, case.spec,
        hidden_delta_TF=leaves[6] if len(leaves) > 6 else None,
        loss_scale=case.loss_scale.to(z.dtype), stats=stats, products=products,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, case.grad_TC.to(dtype))
    return [y.detach(), *grads, *(stats[name] for name in _shown(case))]


def _shown(case: Case) -> list[str]:
    teaches = case.spec.surprise is not None
    return ["expert_surprise", "surprise", "router_loss", "agreement"] if teaches else []


def run_triton(
    case: Case,
    routing: Routing,
    stats: dict[str, Tensor] | None = None,
    counts_X: Tensor | None = None,
) -> Tensor:
    """Run the Triton layer on a case's own leaves."""
    x, direction, log_tau, theta, w_in, w_out, *delta = case.leaves
    return dynmoe_triton(
        x, direction, log_tau, theta, w_in, w_out, routing, case.spec,
        hidden_delta_TF=delta[0] if delta else None, loss_scale=case.loss_scale,
        stats=stats, counts_X=counts_X,
    )  # fmt: skip


def decide(case: Case) -> Routing:
    """Route a case's tokens by Triton."""
    return route(case.leaves[0], *case.router(case.leaves), case.spec)


def compare(case: Case, tolerance: float = 1e-5) -> Report:
    """Check the decisions, then output, gradients and statistics against fp64.

    Args:
        case: from `random_case`.
        tolerance: of the logits, and how near a threshold either answer is right.
    """
    routing = decide(case)
    report = Report(wrong_decisions(case, routing, tolerance))
    stats: dict[str, Tensor] = {}
    counts_X = torch.zeros(
        case.leaves[1].shape[0] + 1, dtype=torch.int64, device=case.grad_TC.device
    )
    y = run_triton(case, routing, stats, counts_X)
    grads = torch.autograd.grad(y, case.leaves, case.grad_TC)
    ours = [y.detach(), *grads, *(stats[name] for name in _shown(case))]
    fired_E = (routing.state_TE == 1).sum(0)
    if not torch.equal(counts_X, torch.cat([fired_E, fired_E.new_tensor([len(case.grad_TC)])])):
        report.decisions.append("the counter does not hold the tokens fired per expert")
    exact = _reference(case, routing, torch.float64, "loop")
    plain = _reference(case, routing, case.leaves[0].dtype, "grouped")
    names = ["y", *LEAVES[: len(case.leaves)], *_shown(case)]
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        report.ours[name], report.plain[name] = _error(a, c), _error(b, c)
    return report


def _error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference relative to that of the exact value; NaN must stand where it does."""
    value, known = value.double(), ~torch.isnan(exact)
    if not torch.equal(torch.isnan(value), ~known):
        return float("inf")
    distance = (value[known] - exact[known]).norm()
    return float(distance / exact[known].norm().clamp(min=1e-30)) if distance > 0 else 0.0
