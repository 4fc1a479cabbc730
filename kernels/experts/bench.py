"""`tiny-onn bench experts`: check the layer against fp64, and time it beside a dense one.

Everything is timed in turns in one process, forward + backward, by CUDA events behind a pause of
the device that lets the host run ahead; medians. The dense layer has the same active arithmetic:
hidden width = mean experts * expert width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json as json_module
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.experts.activation import activate
from kernels.experts.layer import dynmoe_layer
from kernels.experts.spec import MEASURED, ProductTiles, Tiles
from kernels.experts.surprise import SurpriseSpec
from kernels.experts.triton_check import Case, compare, decide, random_case, run_triton

Call = Callable[[], Any]
PEER = "liger fused_moe"

CHECKS: dict[str, dict[str, Any]] = {
    "swiglu": {"sizes": (1000, 16, 256, 128)},
    "relu2 + delta": {"sizes": (777, 8, 128, 192), "activation": "relu2", "scaled": True},
    "swiglu + delta": {"sizes": (500, 8, 256, 64), "scaled": True},
    "top-k": {
        "sizes": (900, 32, 128, 64), "surprise": None, "surrogate_width": 0.0, "fewest": 2,
        "most": 2, "bias_weighs": False, "stride": 0,
    },
    "one expert": {"sizes": (700, 16, 256, 128), "favour": 3},
    "128 experts": {"sizes": (600, 128, 128, 64), "most": 8, "mean": 4.0},
    "width of 125m": {"sizes": (400, 32, 768, 512), "most": 8, "mean": 4.0},
    "one token": {"sizes": (1, 8, 64, 64)},
}  # fmt: skip
"""Sizes (tokens, experts, width, hidden) and what differs from `check_case`'s defaults."""


def check_case(name: str, dtype: torch.dtype, device: str = "cuda") -> Case:
    """Draw one of CHECKS."""
    taught = SurpriseSpec(temperature=0.7, ce_weight=0.3, coefficient=0.5)
    kwargs = {"surprise": taught, "stride": 7, **CHECKS[name]}
    sizes = kwargs.pop("sizes")
    # As the model does: ours need tensor cores.
    products = MEASURED if dtype == torch.bfloat16 else ProductTiles()
    return random_case(*sizes, dtype=dtype, device=device, products=products, **kwargs)


def check_failures(name: str, dtype: torch.dtype) -> tuple[list[str], float]:
    """Compare one of CHECKS with fp64 on the GPU; returns what is wrong and the worst ratio.

    The ratio is of our error to that of the plain torch layer in the same type.
    """
    half = dtype == torch.bfloat16
    report = compare(check_case(name, dtype), tolerance=2e-5)
    worst = max(report.ours[n] / max(report.plain[n], 1e-6) for n in report.ours)
    return report.failures(gap=1.5 if half else 4.0, floor=3e-3 if half else 1e-4), worst


def _gradients(case: Case, y: Tensor) -> Any:
    return torch.autograd.grad(y, case.leaves, case.grad_TC)


def layer_call(case: Case, implementation: Any = "triton") -> Call:
    """Route, run and go back through a case."""

    def call() -> Any:
        router = case.router(case.leaves)
        y = dynmoe_layer(
            case.leaves[0], router, case.leaves[4], case.leaves[5], case.spec,
            loss_scale=case.loss_scale, implementation=implementation,
        )  # fmt: skip
        return _gradients(case, y)

    return call


def dense_call(tokens: int, width: int, hidden: int, compiled: bool) -> Call:
    """A dense SwiGLU, forward and backward."""

    def draw(*shape: int) -> Tensor:
        leaf: Tensor = torch.randn(*shape, device="cuda") * shape[-1] ** -0.5
        return leaf.bfloat16().requires_grad_()

    leaves = [draw(tokens, width), draw(2 * hidden, width), draw(width, hidden)]
    grad = torch.randn(tokens, width, device="cuda").bfloat16()

    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        y: Tensor = F.linear(activate("swiglu", F.linear(x, w_in)), w_out)
        return y

    chosen: Callable[..., Tensor] = torch.compile(run) if compiled else run
    return lambda: torch.autograd.grad(chosen(*leaves), leaves, grad)


def liger_call(case: Case, k: int) -> Call:
    """liger-kernel's fused MoE (Triton) on the same experts, exactly k per token, no router."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    x, w_in, w_out = (case.leaves[i] for i in (0, 4, 5))
    z = decide(case).z_TE
    top = z.topk(k, dim=1)
    index, weight = top.indices.int(), top.values.softmax(1).requires_grad_()
    leaves = [x, w_in, w_out, weight]

    def call() -> Any:
        y = LigerFusedMoEFunction.apply(x, w_in, w_out, index, weight)
        return torch.autograd.grad(y, leaves, case.grad_TC)

    return call


class Clock:
    """Seconds since the start, in front of every line, and a limit that later parts respect."""

    def __init__(self, limit: float) -> None:
        """Start now."""
        self.begun, self.limit = time.perf_counter(), limit

    def say(self, text: str) -> None:
        """Print at once, with the time."""
        print(f"[{time.perf_counter() - self.begun:5.1f} s] {text}", flush=True)

    def over(self, what: str) -> bool:
        """Whether the limit is reached; says what is left out."""
        late = time.perf_counter() - self.begun > self.limit
        if late:
            self.say(f"{what}: left out, the limit of {self.limit:g} s is reached")
        return late


def base_case(sizes: Sequence[int], mean: float, products: ProductTiles = MEASURED) -> Case:
    """The layer that is timed: bf16, about `mean` experts per token, Surprise and exploration."""
    tokens, experts, width, hidden = sizes
    case = random_case(
        tokens, experts, width, hidden, dtype=torch.bfloat16, device="cuda", mean=mean,
        most=2 * round(mean), surprise=SurpriseSpec(), stride=50, products=products,
    )  # fmt: skip
    # Calibrated thresholds: a temperature or a bias off zero would change the mean.
    for still in (case.leaves[2], case.leaves[3], case.bias_E):
        still.data.zero_()
    return case


def changed(case: Case, *, surprise: bool = True, **route: Any) -> Case:
    """The same tensors under another way to choose experts."""
    spec = dataclasses.replace(
        case.spec,
        route=dataclasses.replace(case.spec.route, **route),
        surprise=case.spec.surprise if surprise else None,
    )
    return case._replace(spec=spec)


def _all_to(case: Case, experts: slice) -> Case:
    bias_E = torch.full_like(case.bias_E, 100.0)
    bias_E[experts] = -100.0
    return case._replace(bias_E=bias_E)


def variants(base: Case, mean: float) -> dict[str, Callable[[], Call]]:
    """What is timed, by name; the functions build the calls."""
    (tokens, width), hidden, k = base.grad_TC.shape, base.leaves[5].shape[2], round(mean)
    quiet = changed(base, surprise=False, stride=0)
    top_k, top_1 = changed(base, most=k, fewest=k), changed(base, most=1, fewest=1, stride=0)

    def routed() -> Call:
        decided = decide(base)
        return lambda: _gradients(base, run_triton(base, decided))

    def with_products(products: ProductTiles) -> Call:
        return layer_call(base._replace(spec=dataclasses.replace(base.spec, products=products)))

    more = dataclasses.replace(MEASURED, dx=Tiles())
    return {
        "dense compiled": lambda: dense_call(tokens, width, k * hidden, True),
        "dense eager": lambda: dense_call(tokens, width, k * hidden, False),
        "ours": lambda: layer_call(base),
        "ours, no surprise": lambda: layer_call(quiet),
        "ours, torch's products": lambda: with_products(ProductTiles()),
        "ours, dx too": lambda: with_products(more),
        "torch": lambda: layer_call(base, "torch"),
        "ours, routed before": routed,
        "ours, balanced top-1": lambda: layer_call(top_1),
        "ours, all to one": lambda: layer_call(_all_to(top_1, slice(1))),
        f"ours, balanced top-{k}": lambda: layer_call(top_k),
        f"ours, all to the same {k}": lambda: layer_call(_all_to(top_k, slice(k))),
        "torch, no surprise": lambda: layer_call(quiet, "torch"),
    }


def built(
    builders: dict[str, Callable[[], Call]], clock: Clock, broken: list[str] | None = None
) -> dict[str, Call]:
    """Build and run every variant once.

    One that cannot be is left out with a line saying why, and its name goes into `broken`.
    """
    calls = {}
    for name, build in builders.items():
        if clock.over(name):
            continue
        try:
            call = build()
            call()
            torch.cuda.synchronize()
        except Exception as e:
            clock.say(f"{name}: left out: {type(e).__name__}: {str(e)[:300]}")
            if broken is not None:
                broken.append(name)
            continue
        calls[name] = call
        once = time_in_turns({name: call}, 2)[name]["ms"]
        clock.say(f"{name}: {once:.3f} ms at first sight")
    return calls


def time_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Median and spread in ms of every call, and how long the host took to issue it."""
    device_ms: dict[str, list[float]] = defaultdict(list)
    host_ms: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, int] = {}
    for i in range(rounds + 2):
        for name, call in calls.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            torch.cuda._sleep(4_000_000)  # type: ignore[no-untyped-call]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun = time.perf_counter()
            start.record()
            call()
            end.record()
            issued = time.perf_counter() - begun
            end.synchronize()
            if i >= 2:
                device_ms[name].append(start.elapsed_time(end))
                host_ms[name].append(issued * 1e3)
            peaks[name] = torch.cuda.max_memory_allocated() - base
    return {
        name: {
            "ms": statistics.median(times),
            "least_ms": min(times),
            "spread": (max(times) - min(times)) / statistics.median(times),
            "host_ms": statistics.median(host_ms[name]),
            "peak_gib": peaks[name] / 2**30,
        }
        for name, times in device_ms.items()
    }


def kernel_table(call: Call) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds) of one call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            found[event.name].append(event.device_time)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def print_times(title: str, times: dict[str, dict[str, float]]) -> None:
    dense = min(
        (row["ms"] for name, row in times.items() if name.startswith("dense")), default=float("nan")
    )
    print(
        f"\n{title}\n{'':>26} {'ms':>8} {'/dense':>7} {'spread':>7} {'host ms':>8} {'peak GiB':>9}"
    )
    for name, row in times.items():
        print(
            f"{name:>26} {row['ms']:8.3f} {row['ms'] / dense:7.3f} {row['spread']:7.1%} "
            f"{row['host_ms']:8.2f} {row['peak_gib']:9.2f}",
            flush=True,
        )


def print_kernels(name: str, call: Call, each: bool) -> list[tuple[str, int, float]]:
    """Print how many kernels a call launches, and `each` of the longest; returns all of them."""
    table = kernel_table(call)
    total = sum(row[2] for row in table)
    print(f"{name}: {sum(row[1] for row in table)} launches, {total:.0f} us of kernels")
    for kernel, count, us in table[: 18 if each else 0]:
        print(f"  {us:9.1f} us {count:3d}x {kernel[:70]}", flush=True)
    return table


def bench_experts(
    shapes: Sequence[Sequence[int]],
    mean: float,
    *,
    check: bool = False,
    peer: bool = False,
    limit: float = 600.0,
    processes: int = 14,
    json: Path | None = None,
    rounds: int = 10,
) -> int:
    """Check and time; print tables, write everything to `json`; return an exit code.

    1 when a check fails, when the layer itself cannot run in one of its variants, or when there is
    no CUDA device to time on.
    """
    if not torch.cuda.is_available():
        print("bench experts needs a CUDA device, and torch sees none")
        return 1
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "checks": {}, "times": []}
    print(f"{results['device']}, torch {torch.__version__}")
    from kernels.experts.sweep import compile_all

    failed = False
    broken: list[str] = []
    clock = Clock(limit)
    for dtype in (torch.bfloat16, torch.float32) if check else ():
        for name in CHECKS:
            try:
                bad, worst = check_failures(name, dtype)
            except Exception as e:
                bad, worst = [f"{type(e).__name__}: {str(e)[:500]}"], float("nan")
            failed |= bool(bad)
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            results["checks"][key] = {"failures": bad, "worst": worst}
            verdict = "FAILED" if bad else "ok"
            print(f"check {key}: {verdict}, worst {worst:.2f}x plain", *bad, sep="\n  ", flush=True)
    for tokens, experts, width, hidden in shapes:
        torch.cuda.empty_cache()
        wait = compile_all((tokens, experts, width, hidden), processes, clock)
        base = base_case((tokens, experts, width, hidden), mean)
        builders = variants(base, mean)
        if peer:
            top_k = changed(base, most=round(mean), fewest=round(mean))
            builders[PEER] = lambda top_k=top_k: liger_call(top_k, round(mean))  # type: ignore[misc]
        calls = built({n: b for n, b in builders.items() if n.startswith("dense")}, clock, broken)
        wait()
        fired = float((decide(base).state_TE == 1).sum()) / tokens
        clock.say(f"{fired:.3f} experts per token")
        others = {n: b for n, b in builders.items() if not n.startswith("dense")}
        calls |= built(others, clock, broken)
        times = time_in_turns(calls, rounds)
        title = f"T={tokens} E={experts} C={width} F={hidden} mean={mean:g} bf16, fwd + bwd"
        print_times(title, times)
        entry: dict[str, Any] = {"title": title, "variants": times, "kernels": {}}
        for name in ("ours", "torch", "dense compiled"):
            if name in calls:
                entry["kernels"][name] = print_kernels(name, calls[name], name == "ours")
        results["times"].append(entry)
        if json is not None:
            json.write_text(json_module.dumps(results, indent=1))
    # Another's layer that cannot run is no fault of ours.
    return int(failed or any(name.startswith("ours") for name in broken))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run `bench_experts`."""
    p = argparse.ArgumentParser(
        prog="tiny-onn bench experts",
        description="The DynMoE layer beside a dense layer of the same active arithmetic.",
        epilog="example: tiny-onn bench experts --check --json experts.json",
    )
    p.add_argument(
        "--shapes", nargs="+", default=["16384,64,2048,1024", "16384,32,768,512"],
        help="tokens,experts,width,hidden of each case",
    )  # fmt: skip
    p.add_argument("--mean", type=float, default=4.0, help="experts per token")
    p.add_argument("--check", action="store_true", help="compare with fp64 first")
    p.add_argument(
        "--peer", action="store_true", help="also time liger-kernel's fused MoE (tunes for minutes)"
    )
    p.add_argument("--json", type=Path, help="write everything to this file")
    p.add_argument("--processes", type=int, default=14, help="compiling at the same time")
    p.add_argument("--limit", type=float, default=600.0, help="seconds after which no part starts")
    p.add_argument("--rounds", type=int, default=10, help="timed calls of each variant")
    a = p.parse_args(arguments)
    shapes = [[int(n) for n in shape.split(",")] for shape in a.shapes]
    return bench_experts(shapes, a.mean, check=a.check, peer=a.peer, limit=a.limit,
        processes=a.processes, json=a.json, rounds=a.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
