"""Statistics that the model's parts keep about themselves: recorded, reduced over ranks, named.

A module that has something to show keeps `stats: dict[str, Tensor]` and refreshes it in forward
only while its `record` is True. 0-D tensors are scalars, 1-D tensors histograms or one number per
expert. Their names and shapes must not depend on the data, so that all ranks agree on them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

ModelStats = dict[str, dict[str, Tensor]]
"""Module path -> name -> float64 tensor on the CPU, 0-D or 1-D."""

SUMMED = ("_count", "_counts", "_sum")
"""Endings of names that are summed over ranks; everything else is averaged."""

GROUPS = {"attention": "nsa", "ffn": "moe"}
"""Which group of tags the statistics of a module belong to, by the last part of its path."""


def _keepers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if hasattr(m, "stats")]


@contextmanager
def recording(model: nn.Module, active: bool = True) -> Iterator[ModelStats]:
    """Let the modules record during the block; the yielded dict is filled when the block ends.

    Filling it is a collective: every rank must enter with the same `active`. With `active` False
    nothing happens and the dict stays empty. With several micro-batches in the block the last one
    is what is shown.
    """
    stats: ModelStats = {}
    if not active:
        yield stats
        return
    modules = _keepers(model)
    for _, module in modules:
        module.record = True  # type: ignore[assignment]
    try:
        yield stats
    finally:
        for _, module in modules:
            module.record = False  # type: ignore[assignment]
    stats.update(collect(model))


def collect(model: nn.Module) -> ModelStats:
    """Gather every module's `stats`, reduced over all ranks in one collective.

    Names ending in `_count`, `_counts` or `_sum` are summed; all others are averaged over the ranks
    on which they are finite (NaN says unknown, as the surprise of an expert that did not run) and
    stay NaN where no rank knows. One more collective compares names and sizes among the ranks
    whenever they differ from the last time.

    Raises:
        ValueError: a statistic has more than one dimension, or the ranks disagree on what there is.
    """
    entries: list[tuple[str, str, Tensor]] = []
    for path, module in _keepers(model):
        kept: dict[str, Tensor] = module.stats  # type: ignore[assignment]
        for name, value in sorted(kept.items()):
            if value.dim() > 1:
                raise ValueError(
                    f"statistic '{name}' of module '{path}' has shape {list(value.shape)}; "
                    "only 0-D and 1-D tensors can be shown"
                )
            entries.append((path, name, value.detach()))
    _check_layout(model, tuple((path, name, v.numel()) for path, name, v in entries))
    if not entries:
        return {}
    device = entries[0][2].device
    flat = torch.cat([v.reshape(-1).to(device, torch.float64) for _, _, v in entries])
    known = torch.isfinite(flat)
    # Sums and the number of ranks that know travel together: one collective for everything.
    both = torch.stack([torch.where(known, flat, 0.0), known.to(torch.float64)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(both)
    total, ranks = both.cpu()
    out: ModelStats = {}
    at = 0
    for path, name, value in entries:
        piece = slice(at, at + value.numel())
        at = piece.stop
        reduced = torch.where(ranks[piece] > 0, total[piece], math.nan)
        if not name.endswith(SUMMED):
            reduced = reduced / ranks[piece].clamp(min=1)
        out.setdefault(path, {})[name] = reduced.reshape(value.shape)
    return out


def _check_layout(model: nn.Module, layout: tuple[tuple[str, str, int], ...]) -> None:
    """Compare (path, name, size) among ranks when it changed, before a reduction could hang."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if getattr(model, "_stats_layout", None) == layout:
        return
    layouts: list[tuple[tuple[str, str, int], ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(layouts, layout)
    for rank, other in enumerate(layouts):
        if other != layouts[0]:
            only = sorted(set(other) ^ set(layouts[0]))[:4]
            raise ValueError(
                f"ranks 0 and {rank} keep different statistics (module, name, size): {only}; "
                "a module's stats must not depend on its data"
            )
    model._stats_layout = layout  # type: ignore[assignment]


def derive(stats: ModelStats) -> None:
    """Add what follows from the load of all ranks together to every module that has `expert_load`.

    `load_entropy` is normalised (1 is perfectly balanced), `load_max` is relative to a balanced
    load, `dead_experts` counts experts without a token in this step. What the module keeps under
    these names itself stands. Of a pool that can still grow, `expert_load` is cut to the experts
    that exist: the others have none because they do not exist, not because they are dead.
    """
    for values in stats.values():
        load = values.get("expert_load")
        if load is None:
            continue
        if "active_experts" in values:
            # Experts open in their order.
            load = values["expert_load"] = load[: int(values["active_experts"])]
        if load.numel() < 2 or not float(load.sum()) > 0:
            continue
        share = load / load.sum()
        entropy = -(share * share.clamp(min=1e-30).log()).sum() / math.log(load.numel())
        values.setdefault("load_entropy", entropy)
        values.setdefault("load_max", share.max() * load.numel())
        values.setdefault("dead_experts", (load == 0).sum().double())


def predictive_integrity(
    loss: float,
    entropy: float,
    surprise: float,
    *,
    alpha: float = 1.0,
    gamma: float = 0.5,
    eps: float = 1e-6,
) -> dict[str, float]:
    """Return PI = exp(-alpha[(1-gamma) L/(tau+eps) + gamma S]) with its terms.

    Args:
        loss: L, nats per token.
        entropy: tau, mean entropy of the predicted distribution, nats.
        surprise: S, mean surprise over layers.
        alpha: how fast integrity falls.
        gamma: weight of surprise against the normalised loss, 0 … 1.
        eps: keeps the division finite.
    """
    error = loss / (entropy + eps)
    value = math.exp(-alpha * ((1 - gamma) * error + gamma * surprise))
    return {"value": value, "error": error, "entropy": entropy, "surprise": surprise}


def group_and_layer(path: str) -> tuple[str, int | None]:
    """Return (group of tags, layer or None) of a module path: 'blocks.3.ffn' -> ('moe', 3)."""
    parts = path.split(".")
    layer = next((int(p) for p in parts if re.fullmatch(r"\d+", p)), None)
    name = next((p for p in reversed(parts) if not p.isdigit()), "model") or "model"
    return GROUPS.get(name, name), layer


def tag(path: str, name: str) -> str:
    """Return the tag of one statistic: ('blocks.3.ffn', 'surprise') -> 'moe/layer_03/surprise'."""
    group, layer = group_and_layer(path)
    return f"{group}/{name}" if layer is None else f"{group}/layer_{layer:02d}/{name}"


def scalars(stats: ModelStats) -> dict[str, float]:
    """Return every 0-D statistic by tag, and its overall value by `group/name`.

    Overall is the mean over the layers that know it, except for counts (`dead_experts`,
    `recycled_experts` and names that are summed over ranks), which are added up.
    """
    out: dict[str, float] = {}
    layers: dict[str, list[float]] = defaultdict(list)
    for path, values in stats.items():
        group, layer = group_and_layer(path)
        for name, value in values.items():
            if value.dim() == 0:
                out[tag(path, name)] = float(value)
                if layer is not None and math.isfinite(float(value)):
                    layers[f"{group}/{name}"].append(float(value))
    for name, values_ in layers.items():
        counted = name.endswith((*SUMMED, "dead_experts", "recycled_experts"))
        out[name] = sum(values_) if counted else sum(values_) / len(values_)
    return out


def vectors(stats: ModelStats) -> dict[str, NDArray[np.float64]]:
    """Return every 1-D statistic by tag, and those of all layers together by `group/name`.

    Counts of equal length are added up over layers, other values are put one after another.
    """
    out: dict[str, NDArray[np.float64]] = {}
    layers: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for path, values in stats.items():
        group, layer = group_and_layer(path)
        for name, value in values.items():
            if value.dim() == 1 and value.numel():
                array = value.numpy()
                out[tag(path, name)] = array
                if layer is not None:
                    layers[f"{group}/{name}"].append(array)
    for name, arrays in layers.items():
        same = all(a.shape == arrays[0].shape for a in arrays)
        out[name] = np.sum(arrays, axis=0) if name.endswith(SUMMED) and same else np.hstack(arrays)
    return out
