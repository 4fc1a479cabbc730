"""The custom dashboard of TensorBoard: which curves stand together in which chart."""

from __future__ import annotations

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, list[object]]]
"""Category -> chart title -> ["Multiline", [regular expressions of tags]]."""

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Loss": {
        "loss, nats per token": ("train/loss", "validation/loss"),
        "bits per byte": ("train/bits_per_byte", "validation/bits_per_byte"),
        "gradient norm": ("train/grad_norm",),
        "learning rate": ("train/lr",),
        "skipped steps so far": ("train/skipped_steps",),
    },
    "Speed & step time": {
        "tokens per second": ("speed/tokens_per_s",),
        "step time by part, seconds": (r"time/[a-z_]+",),
        "waiting: for the slowest rank, for data (shares)": (
            "speed/slowest_share",
            "speed/data_stall_share",
        ),
        "model FLOP utilisation": ("speed/mfu",),
        "memory of rank 0 and the most of any, GiB": ("speed/memory_gib", "speed/memory_most_gib"),
    },
    "Experts": {
        "experts per token": ("moe/experts_per_token",),
        "experts per token by layer": (r"moe/layer_\d+/experts_per_token",),
        "load entropy by layer (1 is balanced)": (r"moe/layer_\d+/load_entropy",),
        "greatest load by layer (1 is balanced)": (r"moe/layer_\d+/load_max",),
        "dead experts": ("moe/dead_experts", r"moe/layer_\d+/dead_experts"),
        "recycled experts so far": ("moe/recycled_experts", r"moe/layer_\d+/recycled_experts"),
        "experts in the pool by layer": (r"moe/layer_\d+/active_experts",),
        "surprise by layer": (r"moe/layer_\d+/surprise",),
        "router loss by layer, nats": (r"moe/layer_\d+/router_loss",),
        "router entropy by layer, nats": (r"moe/layer_\d+/router_entropy",),
        "agreement of router and surprise": (r"moe/layer_\d+/agreement",),
        "predictive integrity": ("pi/value",),
        "terms of predictive integrity": ("pi/error", "pi/entropy", "pi/surprise"),
    },
    "Attention": {
        "gate means by branch": (r"nsa/gate_[a-z]+",),
        "compressed gate by layer": (r"nsa/layer_\d+/gate_compressed",),
        "selected gate by layer": (r"nsa/layer_\d+/gate_selected",),
        "window gate by layer": (r"nsa/layer_\d+/gate_window",),
        "distance to selected blocks, tokens": (r"nsa/(layer_\d+/)?selected_distance",),
    },
    "Tables": {
        "rows per step": (r"tables/[a-z_]*rows",),
        "bytes moved per step": (r"tables/[a-z_]*bytes[a-z_]*",),
        "rows fetched ahead, and not": (r"tables/prefetch_[a-z]+",),
    },
}
"""Category -> chart title -> regular expressions that a tag has to match in full."""


def layout(tags: Iterable[str]) -> Layout:
    """Return the charts that show any of these tags, for `SummaryWriter.add_custom_scalars`."""
    known = list(tags)
    out: Layout = {}
    for category, charts in CHARTS.items():
        for title, patterns in charts.items():
            if any(re.fullmatch(p, tag) for p in patterns for tag in known):
                # TensorBoard anchors an expression at its start only.
                out.setdefault(category, {})[title] = ["Multiline", [f"{p}$" for p in patterns]]
    return out
