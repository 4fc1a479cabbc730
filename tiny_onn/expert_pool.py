"""The pool of experts: dead ones start anew where tokens are served worst, and the pool can grow.

The stacked weights have room for `max_pool` experts from the start, so that no shape ever changes
(ZeRO-3 partitions them once). An expert that does not exist yet is closed: its controller bias is
so high that it neither fires nor explores nor receives a gradient.

Every `dead_window` optimizer steps the layers look at the step before: which experts no token
fired over the whole window, and in which direction the tokens lie whose best expert scores lowest.
A dead expert gets that direction (with noise of its own, so that several dead ones part), fresh
weights, a zero threshold and the mean bias; where none is dead, but many tokens find no expert
above its threshold, one more expert is opened the same way. Master weights, both Adam moments and
the router change together. What is decided and drawn depends on all ranks' sums, the step, the
layer and the expert only: every rank does the same, and a resumed run what the killed one would
have done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from tiny_onn.dynmoe import DynMoe

CLOSED = 1e4
"""Controller bias of an expert that does not exist yet."""

Changes = Mapping[str, Sequence[tuple[int, Tensor]]]
"""Parameter name -> pieces: first element of the flattened parameter, and fp32 values."""

Rewrite = Callable[[Changes], None]
"""Puts new values into master weights and clears the moments behind them; on all ranks."""


def plain_rewrite(model: nn.Module) -> Rewrite:
    """Write into the parameters themselves; for a model without an engine or optimizer state."""

    def rewrite(changes: Changes) -> None:
        parameters = dict(model.named_parameters())
        for name, pieces in changes.items():
            parameter = parameters[name]
            if hasattr(parameter, "ds_id"):
                raise RuntimeError(
                    f"{name} is partitioned: pass the engine's rewrite to update_controllers"
                )
            for start, values in pieces:
                flat = parameter.data.view(-1)
                flat[start : start + values.numel()].copy_(values)

    return rewrite


@torch.no_grad()
def look(biased_TE: Tensor, x_TC: Tensor) -> Tensor:
    """What a batch says about how its tokens are served, fp32 [C + 2].

    Sum of the unit tokens, each weighted by how far its best score lies below the mean best score;
    tokens whose best score is not above the threshold; tokens.
    """
    tokens = x_TC.shape[0]
    if tokens == 0:
        return x_TC.new_zeros(x_TC.shape[1] + 2, dtype=torch.float32)
    best_T = biased_TE.amax(1).float()
    x = x_TC.float()
    weight_T = (best_T.mean() - best_T).clamp(min=0) / x.norm(dim=1).clamp(min=1e-20)
    counts = torch.stack([(best_T <= 0).sum().float(), best_T.new_tensor(float(tokens))])
    return torch.cat([weight_T @ x, counts])


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum in the order of ranks: the same bits everywhere, whatever the backend's algorithm."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).sum(0)


def renew_experts(layers: Mapping[str, DynMoe], rewrite: Rewrite) -> None:
    """Recycle dead experts and open new ones; on all ranks, between two optimizer steps.

    Waits for the device: one copy of what all layers saw.

    Args:
        layers: layers by their path in the model, in the same order on all ranks.
        rewrite: see `Rewrite`.
    """
    every = list(layers.values())
    seen = _sum_over_ranks(torch.cat([layer.seen_X for layer in every])).cpu()
    idle = torch.cat([layer.idle_steps_E for layer in every]).cpu()
    active = torch.cat([layer.active_E for layer in every]).cpu()
    changes: dict[str, list[tuple[int, Tensor]]] = {}
    at = pool_at = 0
    for number, (path, layer) in enumerate(layers.items()):
        pool = layer.cfg.pool
        own = seen[at : at + layer.seen_X.numel()]
        at += layer.seen_X.numel()
        idle_E, active_E = idle[pool_at : pool_at + pool], active[pool_at : pool_at + pool]
        pool_at += pool
        chosen = _choose(idle_E, active_E, own, layer)
        for expert in chosen:
            seed = (layer.steps_done() * 1_000_003 + number * 8_191 + expert) & 0x7FFFFFFF
            for name, values in _fresh(own[:-2], layer, seed).items():
                pieces = changes.setdefault(f"{path}.{name}" if path else name, [])
                pieces.append((expert * values.numel(), values))
        if chosen:
            others = active_E.clone()
            others[chosen] = False
            layer.open_experts(chosen, others, recycled=bool(active_E[chosen[0]]))
    if changes:
        rewrite(changes)


def _choose(idle_E: Tensor, active_E: Tensor, seen: Tensor, layer: DynMoe) -> list[int]:
    cfg = layer.cfg
    if float(seen[-1]) == 0 or float(seen[:-2].norm()) == 0:
        return []
    dead = (active_E & (idle_E >= cfg.dead_window)).nonzero()[:, 0].tolist()
    if dead and cfg.recycle:
        return [int(e) for e in dead]
    closed = (~active_E).nonzero()[:, 0].tolist()
    unserved = float(seen[-2] / seen[-1])
    return [int(closed[0])] if closed and not dead and unserved > cfg.grow_share else []


def _fresh(direction_C: Tensor, layer: DynMoe, seed: int) -> dict[str, Tensor]:
    """Flat fp32 values of one new expert."""
    g = torch.Generator().manual_seed(seed)
    cfg, width = layer.cfg, direction_C.numel()
    scaled = direction_C / direction_C.norm() * width**0.5
    return {
        "direction_EC": (scaled + torch.randn(width, generator=g)) / 2**0.5,
        "theta_E": torch.zeros(1),
        "w_in_EIC": torch.randn(layer.inner * width, generator=g) * cfg.init_std,
        "w_out_ECF": torch.randn(width * cfg.expert_hidden, generator=g) * cfg.init_std,
    }
