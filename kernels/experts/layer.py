"""The DynMoE layer behind one function: torch on any device, Triton on a GPU.

    s = cosine(x, direction)                      fp32 whatever the model's dtype
    z = tau s - theta - bias                      tau = tau_0 e^log_tau, theta = theta_0 + theta_E
    e fires when z > 0                            at least `fewest`, at most `most`
    y = sum over fired p_e expert_e(x)            p = softmax of z over the fired

`torch` composes `router.py` and `api.py`; `triton` is one function with kernels of its own around
torch's grouped products (`triton_layer.py`). Both decide, compute and learn the same.

Shapes: T tokens, E experts, C width, F hidden, I inner (swiglu 2F, relu2 F).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.experts.api import Implementation as Products
from kernels.experts.api import expert_ffn
from kernels.experts.router import cosine_scores, explore, fire, fired_softmax, route_stats
from kernels.experts.spec import LayerSpec

LayerImplementation = Literal["auto", "torch", "triton"]


class Router(NamedTuple):
    """The router's parameters and its controller's state.

    Attributes:
        direction_EC: the experts' directions; only their direction counts.
        log_tau: [1], log of the scale on top of tau_0.
        theta_E: thresholds on top of theta_0.
        bias_E: the controller's bias, fp32; no gradient.
        step_1: int64 [1]; decides, with a token's index in its sequence, who explores what.
        first: index of the first token in the pass, which ranks may share.
    """

    direction_EC: Tensor
    log_tau: Tensor
    theta_E: Tensor
    bias_E: Tensor
    step_1: Tensor
    first: int = 0


def logits(x_TC: Tensor, router: Router, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return (z that weighs, z that chooses), [T, E] in fp32 (fp64 for fp64 inputs)."""
    s_TE = cosine_scores(x_TC, router.direction_EC)
    tau_1, theta_E = router.log_tau.to(s_TE.dtype).exp(), router.theta_E.to(s_TE.dtype)
    z_TE = spec.route.tau_0 * tau_1 * s_TE - (spec.route.theta_0 + theta_E)
    biased_TE = z_TE - router.bias_E
    return (biased_TE if spec.route.bias_weighs else z_TE), biased_TE


def run_decided(
    x_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    z_TE: Tensor,
    fired_TE: Tensor,
    explored_TE: Tensor | None,
    spec: LayerSpec,
    *,
    hidden_delta_TF: Tensor | None = None,
    loss_scale: Tensor | None = None,
    counts_X: Tensor | None = None,
    stats: dict[str, Tensor] | None = None,
    products: Products = "auto",
) -> Tensor:
    """Weigh and run experts that are chosen already; arguments as in `dynmoe_layer`."""
    p_TE = fired_softmax(z_TE, fired_TE, spec.surrogate_width)
    if stats is not None:
        stats.update(route_stats(fired_TE, p_TE.detach(), spec.route.most))
    return expert_ffn(
        x_TC,
        w_in_EIC,
        w_out_ECF,
        p_TE,
        fired_TE,
        activation=spec.activation,
        max_fired=spec.route.most,
        hidden_delta_TF=hidden_delta_TF,
        surprise=spec.surprise,
        z_TE=z_TE,
        loss_scale=loss_scale,
        explored_TE=explored_TE,
        max_explored=spec.route.explored(x_TC.shape[0]),
        counts_X=counts_X,
        stats=stats,
        implementation=products,
    )


def dynmoe_layer(
    x_TC: Tensor,
    router: Router,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    spec: LayerSpec,
    *,
    hidden_delta_TF: Tensor | None = None,
    loss_scale: Tensor | None = None,
    counts_X: Tensor | None = None,
    stats: dict[str, Tensor] | None = None,
    implementation: LayerImplementation = "auto",
) -> Tensor:
    """Route every token and return the weighted sum of its fired experts, [T, C] in x's dtype.

    Args:
        x_TC: tokens, bf16 or fp32 (fp64 with `torch` on a CPU).
        router: see `Router`; pass the Parameters themselves.
        w_in_EIC: stacked input weights, dtype of x; pass the Parameter itself.
        w_out_ECF: stacked output weights, dtype of x; pass the Parameter itself.
        spec: what the layer does.
        hidden_delta_TF: the hidden activations of each token are multiplied by 1 + delta, dtype of
            x; or None.
        loss_scale: 0-dim fp32, d(loss passed to backward)/d(nll of one token); needed with
            Surprise, which is divided by it; the router's gradient carries it like any other.
        counts_X: int64 [E + 1] counter; the backward adds the tokens fired per expert and, last, T.
        stats: dict filled by the forward (`route_stats`) and the backward (`lesson_stats`).
        implementation: `torch`, `triton` (CUDA, bf16 or fp32), or `auto`: Triton wherever it can.

    Raises:
        ValueError: unknown implementation, shapes that do not fit, a missing loss_scale, or tensors
            that `triton` was asked for and cannot take.
    """
    if implementation not in get_args(LayerImplementation):
        raise ValueError(f"implementation must be auto, torch or triton, found {implementation!r}")
    if implementation == "triton" or (implementation == "auto" and x_TC.is_cuda):
        from kernels.experts.triton_layer import dynmoe_triton, route, supports

        reason = supports(x_TC, w_out_ECF)
        if reason is not None and implementation == "triton":
            raise ValueError(f"the Triton layer cannot run: {reason}")
        if reason is None:
            decided = route(x_TC, *router, spec)
            if stats is not None:
                stats.update(route_stats(decided.state_TE == 1, decided.p_TE, spec.route.most))
            return dynmoe_triton(
                x_TC, router.direction_EC, router.log_tau, router.theta_E, w_in_EIC, w_out_ECF,
                decided, spec, hidden_delta_TF=hidden_delta_TF, loss_scale=loss_scale,
                counts_X=counts_X, stats=stats,
            )  # fmt: skip
    z_TE, biased_TE = logits(x_TC, router, spec)
    how = spec.route
    with torch.no_grad():
        fired_TE = fire(biased_TE, how.fewest, how.most)
        explored_TE = (
            explore(biased_TE, fired_TE, router.step_1, how.stride, router.first, how.sequence)
            if how.stride
            else None
        )
    return run_decided(
        x_TC, w_in_EIC, w_out_ECF, z_TE, fired_TE, explored_TE, spec,
        hidden_delta_TF=hidden_delta_TF, loss_scale=loss_scale, counts_X=counts_X, stats=stats,
    )  # fmt: skip
