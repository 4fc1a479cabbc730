"""`tiny-onn bench routing CONFIG`: what a feed-forward layer learns, variant beside variant.

Every variant trains the same model from the same seed on the same batches, one run after another in
one process without an engine: fp32 masters and AdamW here, weights in the device's type there. So a
run costs what its arithmetic costs, and dozens of short ones answer what one long one cannot. Only
for models that fit one device; DeepEmbed is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import PackedLoader
from data.packing import Batch
from kernels import Documents
from kernels.transfer import to_device
from launcher import config
from launcher.components import seed_everything
from launcher.config import RunConfig
from launcher.model_stats import derive, recording, scalars
from launcher.options import variant
from launcher.pretrain import resolved
from parallel.schedule import learning_rate_factor
from parallel.zero_setup import parameter_groups
from tiny_onn.dynmoe import DynMoe, update_controllers
from tiny_onn.expert_pool import Changes
from tiny_onn.modular import ModelOutput, TinyOnn

VARIANTS: dict[str, list[str]] = {
    "param_grad": ["--model.ffn.surprise", "param_grad"],
    "off": ["--model.ffn.surprise", "off"],
    "dense": ["--model.ffn.kind", "dense"],
    "output_grad": ["--model.ffn.surprise", "output_grad"],
    "no lesson": ["--model.ffn.router_coefficient", "0"],
}
"""Names and the overrides that make them; others are given as NAME=WORDS."""


class Masters:
    """AdamW on fp32 copies of a model's weights; with fp32 weights on the weights themselves."""

    def __init__(self, model: nn.Module, cfg: RunConfig) -> None:
        """Copy the weights."""
        o = cfg.engine.optimizer
        self.cfg = cfg
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        groups = []
        for group in parameter_groups(model, o.weight_decay):
            masters = []
            for weight in group["params"]:
                same = weight.dtype == torch.float32
                master = weight if same else nn.Parameter(weight.detach().float())
                self.pairs.append((weight, master))
                masters.append(master)
            groups.append({**group, "params": masters, "lr": o.lr})
        masters_of = {id(weight): (weight, master) for weight, master in self.pairs}
        self.named = {name: masters_of[id(p)] for name, p in model.named_parameters()}
        self.adam = torch.optim.AdamW(
            groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps,
            fused=self.pairs[0][0].is_cuda,
        )  # fmt: skip

    def rewrite(self, changes: Changes) -> None:
        """Give new experts fresh weights and moments."""
        for name, pieces in changes.items():
            weight, master = self.named[name]
            state = self.adam.state.get(master, {})
            for start, values in pieces:
                part = slice(start, start + values.numel())
                master.data.view(-1)[part].copy_(values)
                weight.data.view(-1)[part].copy_(values)
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in state:
                        state[moment].view(-1)[part].zero_()

    def step(self, step: int) -> None:
        """Clip, step, and write the weights back."""
        o = self.cfg.engine.optimizer
        factor = learning_rate_factor(self.cfg.engine.schedule, step, self.cfg.train.steps)
        for group in self.adam.param_groups:
            group["lr"] = o.lr * factor * group["lr_multiplier"]
        for weight, master in self.pairs:
            if weight is not master:
                assert weight.grad is not None
                master.grad = weight.grad.float()
        masters = [master for _, master in self.pairs]
        if o.clip > 0:
            nn.utils.clip_grad_norm_(masters, o.clip, foreach=True)
        self.adam.step()
        copies = [(w, m) for w, m in self.pairs if w is not m]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([w for w, _ in copies], [m for _, m in copies])
        for weight, master in self.pairs:
            weight.grad = master.grad = None


def forward(model: TinyOnn, batch: Batch, scale: Tensor, device: torch.device) -> ModelOutput:
    """Run a batch."""
    output = model(
        to_device(batch.ids_T, device),
        to_device(batch.labels_T, device),
        Documents(batch.lengths, device),
        scale,
    )
    assert isinstance(output, ModelOutput)
    return output


def validate(model: TinyOnn, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean nats per label of held-out batches."""
    model.eval()
    one = torch.ones((), device=device)
    with torch.no_grad():
        nll = sum(forward(model, b, one, device).nll_sum.double() for b in batches)
    model.train()
    return float(nll) / sum(b.n_labels for b in batches)


def train(
    cfg: RunConfig, steps: Sequence[Sequence[Batch]], held_out: Sequence[Batch], every: int
) -> dict[str, Any]:
    """Train one variant; returns its losses, what its layers showed, and the seconds it took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = cfg.engine.dtype(device)
    seed_everything(cfg.seed, 0)
    model = TinyOnn(cfg.model, sequence=cfg.data.seq_len).to(device, dtype)
    optimizer = Masters(model, cfg)
    curve: list[dict[str, float]] = []
    begun = time.perf_counter()
    counts: list[Tensor] = []
    for i, batches in enumerate(steps):
        labels = sum(b.n_labels for b in batches)
        scale = torch.full((), 1 / labels, device=device)
        record = every > 0 and (i + 1) % every == 0
        nll = torch.zeros((), device=device)
        with recording(model, record) as stats:
            for batch in batches:
                output = forward(model, batch, scale, device)
                output.loss.backward()  # type: ignore[no-untyped-call]
                nll += output.nll_sum
        optimizer.step(i)
        counts.extend(_fired_per_token(model))
        update_controllers(model, optimizer.rewrite)
        if record:
            derive(stats)
            shown = {k: v for k, v in scalars(stats).items() if "layer" not in k}
            curve.append({"step": i + 1, "loss": float(nll) / labels, **shown})
    result = {
        "validation": validate(model, held_out, device),
        "seconds": time.perf_counter() - begun,
        "experts_per_token": _trend(counts, len(steps)),
        "dead_at_end": _dead(model),
        "curve": curve,
    }
    return result


def _fired_per_token(model: nn.Module) -> list[Tensor]:
    """Mean experts per token of every layer in the step that just ended, on the device."""
    found = [m.counts_X for m in model.modules() if isinstance(m, DynMoe)]
    return [torch.stack([c[:-1].sum() / c[-1].clamp(min=1) for c in found])] if found else []


def _trend(counts: list[Tensor], steps: int) -> dict[str, Any]:
    """Mean, least and most of 50-step means after warm-up (the first tenth), over all layers."""
    if not counts:
        return {}
    late = torch.stack(counts)[steps // 10 :].double().cpu()
    size = min(50, len(late))
    windows = torch.stack(
        [late[at : at + size].mean(0) for at in range(0, len(late) - size + 1, size)]
    )
    return {
        "mean": float(late.mean()),
        "least_window": float(windows.min()),
        "most_window": float(windows.max()),
    }


def _dead(model: nn.Module) -> int:
    layers = [m for m in model.modules() if isinstance(m, DynMoe)]
    return sum(int((m.idle_steps_E >= m.cfg.dead_window).sum()) for m in layers)


def _read(cfg: RunConfig, sequences: int) -> tuple[list[list[Batch]], list[Batch]]:
    loader = PackedLoader(
        cfg.data,
        micro_batch=cfg.train.micro_batch,
        accumulation=cfg.train.global_batch // cfg.train.micro_batch,
        rank=0,
        world=1,
    )
    steps = [loader.next_step() for _ in range(cfg.train.steps)]
    held_out = list(loader.evaluation_batches(sequences))
    loader.close()
    return steps, held_out


def main(argv: Sequence[str]) -> int:
    """Train every variant with every seed; print validation losses and write everything."""
    p = argparse.ArgumentParser(
        prog="tiny-onn bench routing",
        description="Validation loss of one model with different feed-forward layers and routers. "
        "Overrides (--dotted.key value) go to every variant.",
        epilog="example: tiny-onn bench routing launcher/configs/demo.yaml --variants param_grad "
        "off dense 'sharp=--model.ffn.router_temperature 0.3' --seeds 0 1 2 --json routing.json",
    )
    p.add_argument("config", type=Path)
    named = variant(VARIANTS)
    default = [named(name) for name in ("param_grad", "off", "dense")]
    p.add_argument("--variants", nargs="+", type=named, default=default)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--sequences", type=int, default=64, help="held-out sequences")
    p.add_argument("--every", type=int, default=50, help="steps between records of the layers")
    p.add_argument("--json", type=Path, help="file for all figures")
    a, overrides = p.parse_known_args(argv)
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    words = [*overrides, "--model.deepembed.kind", "off"]
    steps, held_out = _read(config.load(a.config, words), a.sequences)
    print(
        f"{len(steps)} steps of {sum(len(b.ids_T) for b in steps[0])} tokens, "
        f"{sum(b.n_labels for b in held_out)} held-out labels",
        flush=True,
    )
    for seed in a.seeds:
        order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
        for name, extra in a.variants:
            cfg = resolved(config.load(a.config, [*words, *extra, "--seed", str(seed)]))
            found = train(cfg, [steps[i] for i in order], held_out, a.every)
            results[name].append({"seed": seed, **found})
            last = found["curve"][-1] if found["curve"] else {}
            shown = {k: round(v, 3) for k, v in last.items() if k.startswith("moe/")}
            print(
                f"seed {seed} {name}: validation {found['validation']:.4f}, "
                f"{found['seconds']:.1f} s, {found['experts_per_token']}, "
                f"dead {found['dead_at_end']}, last {shown}",
                flush=True,
            )
            if a.json is not None:
                a.json.write_text(json.dumps(results, indent=1))
    print(f"{'variant':>24} {'validation':>10} {'spread':>8}  (nats per label, mean of seeds)")
    for name, runs in results.items():
        losses = [run["validation"] for run in runs]
        spread = max(losses) - min(losses)
        print(f"{name:>24} {statistics.mean(losses):10.4f} {spread:8.4f}  {losses}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
