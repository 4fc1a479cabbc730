"""Feed-forward layers: DynMoE, whose tokens fire as many experts as they need, and a dense one.

DynMoE in one breath:

    s = cosine(x, direction_e)           fp32 whatever the model's dtype
    z = tau s - theta_e - bias_e         theta calibrated, learnable; bias set by the controller
    e fires when z > 0                   at least min_experts, at most max_experts, always alike
    y = sum over fired p_e expert_e(x)   p = softmax of z over the fired

The router learns from three things: the loss through p (with a surrogate gradient across the
threshold, so that experts that did not fire learn too), Surprise (kernels/experts/surprise.py), and
a few explored pairs, run with weight zero. A controller holds the mean number of experts per token
at the target and pulls idle experts back; it acts once per optimizer step on counts of all ranks.

`surprise: off` is the plain counterpart: the target_experts best experts per token, balanced
by a selection bias without an auxiliary loss (arXiv 2408.15664).

Shapes: T tokens, C width, E experts, F expert hidden, I inner channels (swiglu 2F, relu2 F).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.experts import (
    Activation,
    LayerSpec,
    Router,
    RouteSpec,
    activate,
    dynmoe_layer,
    inner_width,
)
from kernels.experts.layer import logits
from kernels.experts.spec import MEASURED, ProductTiles
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.expert_pool import CLOSED, Rewrite, look, plain_rewrite, renew_experts
from tiny_onn.router import calibrated_threshold


class DenseFfn(nn.Module):
    """The dense counterpart: one SwiGLU or squared-ReLU layer."""

    def __init__(self, activation: Activation, width: int, hidden: int, init_std: float) -> None:
        """Draw the weights from the global generator."""
        super().__init__()
        self.activation: Activation = activation
        self.w_in_IC = nn.Parameter(torch.empty(inner_width(activation, hidden), width))
        self.w_out_CF = nn.Parameter(torch.empty(width, hidden))
        nn.init.normal_(self.w_in_IC, std=init_std)
        nn.init.normal_(self.w_out_CF, std=init_std)

    def forward(
        self,
        x_TC: Tensor,
        hidden_delta_TF: Tensor | None,
        loss_scale: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """Return [T, C]; hidden activations times 1 + hidden_delta_TF, the others idle."""
        h_TF = activate(self.activation, F.linear(x_TC, self.w_in_IC), hidden_delta_TF)
        return F.linear(h_TF, self.w_out_CF)


class DynMoe(nn.Module):
    """E experts of which every token fires some; see the top of this file.

    Attributes:
        record: refresh `stats` in forward and backward.
        stats: detached device tensors. From the forward: experts_per_token,
            experts_per_token_counts [max + 1], expert_load [E] (share of tokens), dead_experts,
            active_experts, recycled_experts (so far), router_entropy (nats, of p). From the
            backward: surprise, expert_surprise [E] (NaN where an expert did not fire), router_loss
            (nats), agreement (share of tokens for which the largest z is the least S).
    """

    active_E: Tensor
    controller_bias_E: Tensor
    counts_X: Tensor
    idle_steps_E: Tensor
    load_mean_E: Tensor
    recycled_1: Tensor
    seen_X: Tensor
    step_1: Tensor

    def __init__(self, cfg: DynMoeConfig, width: int, sequence: int = 0) -> None:
        """Draw the weights from the global generator and calibrate the thresholds to the target.

        Args:
            cfg: sizes and habits.
            width: C.
            sequence: tokens of each of the sequences that a training pass consists of; 0: a pass is
                one sequence. Who explores is decided by a token's index in its sequence, whatever
                else is in the pass.
        """
        super().__init__()
        self.cfg = cfg
        self.spec = cfg.surprise_spec()
        self.record = False
        self.stats: dict[str, Tensor] = {}
        E, hidden = cfg.pool, cfg.expert_hidden
        self.inner = inner_width(cfg.activation, hidden)
        self.w_in_EIC = nn.Parameter(torch.empty(E, self.inner, width))
        self.w_out_ECF = nn.Parameter(torch.empty(E, width, hidden))
        self.direction_EC = nn.Parameter(torch.empty(E, width))
        nn.init.normal_(self.w_in_EIC, std=cfg.init_std)
        nn.init.normal_(self.w_out_ECF, std=cfg.init_std)
        # Only its direction counts. At unit entries a step of Adam turns it by about the learning
        # rate; a shorter vector turns so fast that the controller cannot hold the count.
        nn.init.normal_(self.direction_EC)
        self.direction_EC.no_decay = True  # type: ignore[attr-defined]
        # tau and theta start at zero on top of these host constants, so that a bf16 copy of them
        # keeps the calibration and still resolves small steps.
        self.log_tau = nn.Parameter(torch.zeros(1))
        self.theta_E = nn.Parameter(torch.zeros(E))
        self.tau_0 = cfg.logit_std * math.sqrt(width)
        self.theta_0 = self.tau_0 * calibrated_threshold(
            cfg.experts, cfg.target_experts, *cfg.fired_bounds, width
        )
        self.sequence = sequence
        self.stride = cfg.explore_stride if self.spec else 0
        self.shared = (
            DenseFfn(cfg.activation, width, hidden, cfg.init_std) if cfg.shared_expert else None
        )
        # .float() undoes the half precision that ZeRO's construction context gives new tensors.
        bias_E = torch.zeros(E).float()
        bias_E[cfg.experts :] = CLOSED
        self.register_buffer("controller_bias_E", bias_E)
        self.register_buffer("active_E", torch.arange(E) < cfg.experts)
        self.register_buffer("recycled_1", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("seen_X", torch.zeros(width + 2).float(), persistent=False)
        self._steps = (-1, 0)
        self.register_buffer("load_mean_E", torch.zeros(E).float())
        self.register_buffer("idle_steps_E", torch.zeros(E, dtype=torch.int64))
        self.register_buffer("counts_X", torch.zeros(E + 1, dtype=torch.int64))
        self.register_buffer("step_1", torch.zeros(1, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynMoe:
        """Keep the controller's fp32 buffers exact when the module is cast to another dtype."""
        names = ("controller_bias_E", "load_mean_E", "seen_X")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            kept = new.float() if old.is_meta else old.to(new.device)
            setattr(self, name, kept)
        return self

    def forward(
        self,
        x_TC: Tensor,
        hidden_delta_TF: Tensor | None,
        loss_scale: Tensor | None,
        first: int = 0,
    ) -> Tensor:
        """Return the weighted sum of the fired experts, [T, C] in the dtype of x.

        Under activation checkpointing scores, choice and exploration are computed again with the
        rest of the block, by decision. Nothing in them draws, or adds in an order that could
        change, so that they come out bitwise alike; their product is E columns beside 3F for each
        of a token's experts, well below a percent of the layer; and to keep them, E fp32 numbers a
        token would need a way of their own past the checkpoint. `seen_X` then takes every token
        twice, which changes neither its direction nor the ratio that is read from it; the counts
        are taken in the backward, once.

        Args:
            x_TC: tokens after the norm, bf16 or fp32.
            hidden_delta_TF: delta [T, F] of DeepEmbed `hidden`, whose factor on the hidden
                activations is 1 + delta; or None.
            loss_scale: fp32 0-dim, d(loss passed to backward)/d(nll of one token); needed to train
                with surprise. S is free of it; the router's gradient carries it like any other.
            first: index of x's first token in the pass, so that the same tokens explore however
                many ranks share it.
        """
        if hidden_delta_TF is not None:
            hidden_delta_TF = hidden_delta_TF.to(x_TC.dtype)
        spec = self.layer_spec()
        router = Router(
            self.direction_EC,
            self.log_tau,
            self.theta_E,
            self.controller_bias_E,
            self.step_1,
            first,
        )
        if self.training and (self.steps_done() + 1) % self.cfg.dead_window == 0:
            with torch.no_grad():
                self.seen_X += look(logits(x_TC, router, spec)[1], x_TC)
        y_TC = dynmoe_layer(
            x_TC,
            router,
            self.w_in_EIC,
            self.w_out_ECF,
            spec,
            hidden_delta_TF=hidden_delta_TF,
            loss_scale=loss_scale,
            counts_X=self.counts_X if self.training else None,
            stats=self.stats if self.record else None,
        )
        if self.record:
            self.stats["dead_experts"] = (self.idle_steps_E >= self.cfg.dead_window).sum()
            self.stats["active_experts"] = self.active_E.sum()
            self.stats["recycled_experts"] = self.recycled_1.sum()
        return y_TC if self.shared is None else y_TC + self.shared(x_TC, hidden_delta_TF)

    def layer_spec(self) -> LayerSpec:
        """What the layer does in the present mode; only training explores and teaches."""
        cfg = self.cfg
        route = RouteSpec(
            tau_0=self.tau_0,
            theta_0=self.theta_0,
            fewest=cfg.fired_bounds[0],
            most=cfg.fired_bounds[1],
            # The balancing bias of plain top-k selects and does not weigh.
            bias_weighs=self.spec is not None,
            stride=self.stride if self.training else 0,
            sequence=self.sequence,
        )
        return LayerSpec(
            activation=cfg.activation,
            route=route,
            surprise=self.spec if self.training else None,
            surrogate_width=cfg.surrogate_width if self.spec is not None else 0.0,
            # Ours need tensor cores.
            products=MEASURED if self.w_in_EIC.dtype == torch.bfloat16 else ProductTiles(),
        )

    @torch.no_grad()
    def control(self, counts_X: Tensor) -> None:
        """Move the controller by one optimizer step and clear the counter.

        Args:
            counts_X: int64 [E + 1], tokens that fired each expert and, last, all tokens, over all
                micro-batches and ranks: the same on every rank, and so is then the state.
        """
        cfg = self.cfg
        fired_E, tokens = counts_X[:-1].double(), counts_X[-1].double()
        seen = tokens > 0
        mean = fired_E.sum() / tokens.clamp(min=1)
        exist = self.active_E.sum()
        relative_E = fired_E / (fired_E.sum() / exist).clamp(min=1e-9)
        if self.spec is None:
            move_E = cfg.balance_gain * (relative_E - 1).clamp(-1, 1)
        else:
            move_E = cfg.controller_gain * (mean / cfg.target_experts - 1).clamp(-1, 1)
            pull_E = cfg.balance_gain * (relative_E / cfg.idle_share - 1).clamp(-1, 0)
            pull_E = torch.where(self.active_E, pull_E, 0.0)
            # Off its mean, or pulling some back would raise the count against the line above.
            move_E = move_E + pull_E - pull_E.sum() / exist
        self.controller_bias_E += torch.where(seen & self.active_E, move_E, 0.0).float()
        load_E = (fired_E / tokens.clamp(min=1)).float()
        # A mean over about dead_window steps, filled by the first one.
        rate = torch.where(self.step_1 == 0, 1.0, 1 / cfg.dead_window)
        self.load_mean_E += torch.where(seen, rate * (load_E - self.load_mean_E), 0.0)
        idle_E = torch.where((fired_E > 0) | ~self.active_E, 0, self.idle_steps_E + 1)
        self.idle_steps_E.copy_(torch.where(seen, idle_E, self.idle_steps_E))
        done = self.steps_done() + 1
        self.step_1 += 1
        self._steps = (self.step_1._version, done)
        self.counts_X.zero_()

    def steps_done(self) -> int:
        """Optimizer steps so far, as the host knows them; reads the device after a restore only."""
        if self._steps[0] != self.step_1._version:
            self._steps = (self.step_1._version, int(self.step_1))
        return self._steps[1]

    @torch.no_grad()
    def open_experts(self, experts: list[int], others_E: Tensor, *, recycled: bool) -> None:
        """Let new experts take part, at the mean bias of the others.

        Args:
            experts: numbers of the new ones.
            others_E: bool [E], those that took part and go on as they are; on the host.
            recycled: the new ones took the place of dead ones.
        """
        others = others_E.to(self.controller_bias_E.device)
        bias = torch.where(others, self.controller_bias_E, 0.0).sum() / others.sum().clamp(min=1)
        self.controller_bias_E[experts] = bias
        self.active_E[experts] = True
        self.idle_steps_E[experts] = 0
        self.load_mean_E[experts] = 0.0
        if recycled:
            self.recycled_1 += len(experts)


def update_controllers(
    model: nn.Module, rewrite: Rewrite | None = None, *, skipped: bool = False
) -> None:
    """Move the controller of every DynMoE layer; call it after each optimizer step, on all ranks.

    One all-reduce of integer counts for all layers together over the default process group (when
    there is one), so that the controllers stay bitwise alike; no host sync. After a skipped step
    (alike on all ranks) nothing moves, and what was counted is forgotten. Every `dead_window` steps
    the pool is looked after, too (`expert_pool.py`).

    Args:
        model: holds the layers.
        rewrite: how new experts get into weights and optimizer state (`Engine.rewrite`); None
            writes into the parameters of a model that has neither engine nor moments.
        skipped: the optimizer step was skipped.
    """
    named = {p: m for p, m in model.named_modules() if isinstance(m, DynMoe)}
    layers = list(named.values())
    if not layers:
        return
    if skipped:
        for layer in layers:
            layer.counts_X.zero_()
            layer.seen_X.zero_()
        return
    counts = torch.cat([layer.counts_X for layer in layers])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    sizes = [layer.counts_X.numel() for layer in layers]
    for layer, part in zip(layers, torch.split(counts, sizes), strict=True):
        layer.control(part)
    due = {p: m for p, m in named.items() if m.steps_done() % m.cfg.dead_window == 0}
    if due:
        renew_experts(due, rewrite or plain_rewrite(model))
        for layer in due.values():
            layer.seen_X.zero_()


def build_ffn(cfg: DynMoeConfig, width: int, sequence: int = 0) -> DynMoe | DenseFfn:
    """Build the feed-forward layer that the configuration asks for; see `DynMoe`."""
    if cfg.kind == "dynmoe":
        return DynMoe(cfg, width, sequence)
    return DenseFfn(cfg.activation, width, cfg.hidden_width(), cfg.init_std)
