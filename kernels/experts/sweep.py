"""Which grouped products should be our own, and how tiled: measured on this GPU.

    python -m kernels.experts.sweep [--json F] [--sizes 16384,64,2048,1024]

Compiles in parallel processes first (they only fill Triton's cache), checks every candidate against
torch's product, times each alone, then times the whole layer for every some combinations of own and
torch's products with the best tiles found. The winner belongs into `spec.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json as json_module
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from kernels.experts.bench import (
    Clock,
    base_case,
    built,
    changed,
    layer_call,
    print_kernels,
    print_times,
    time_in_turns,
    variants,
)
from kernels.experts.spec import MEASURED, ProductTiles, Tiles
from kernels.experts.triton_activation import (
    HiddenRows,
    activation_backward_triton,
    activation_triton,
)
from kernels.experts.triton_check import Case
from kernels.experts.triton_lesson import RouterGrads, direction_grads_triton, lesson_triton
from kernels.experts.triton_products import (
    ALIGN,
    down_product,
    dx_product,
    hidden_gradients,
    up_product,
    weight_gradient,
)
from kernels.experts.triton_route import Routing, route_triton
from kernels.experts.triton_rows import (
    combine_dx_triton,
    combine_triton,
    norm_triton,
    spread_triton,
)

_N128 = [
    Tiles(n=128, stages=4, flatten=False),
    Tiles(n=128, stages=3, flatten=False),
    Tiles(n=128, stages=3),
    Tiles(n=64, warps=4, stages=4, flatten=False, per_unit=2),
    Tiles(n=64, warps=4, stages=3, per_unit=2),
]
_N256 = [
    Tiles(stages=4, flatten=False),
    Tiles(stages=3, flatten=False),
    Tiles(stages=3),
    Tiles(stages=4),
    Tiles(n=128, warps=4, stages=4, flatten=False, per_unit=2),
    Tiles(n=128, warps=4, stages=3, per_unit=2),
]
_WEIGHTS = [
    Tiles(stages=7, flatten=False),
    Tiles(stages=5, flatten=False),
    Tiles(stages=7),
    Tiles(stages=5),
    Tiles(n=128, warps=4, stages=5, flatten=False, per_unit=2),
    Tiles(n=128, warps=8, stages=7),
]
CANDIDATES: dict[str, list[Tiles]] = {
    "up": _N128,
    "down": _N256,
    "dh": [*_N128, Tiles(n=128, warps=4, stages=3, flatten=False, per_unit=2)],
    "dx": _N256,
    "dw_in": _WEIGHTS,
    "dw_out": _WEIGHTS,
}


@dataclasses.dataclass
class Work:
    """Operands of all products of one layer."""

    case: Case
    routing: Routing
    x_TC: Tensor
    w_in_EIC: Tensor
    w_out_ECF: Tensor
    x_PC: Tensor
    g_PC: Tensor
    inner_PI: Tensor
    h_PF: Tensor
    dinner_PI: Tensor

    @property
    def ends(self) -> Tensor:
        return self.routing.ends_E


def prepare(case: Case) -> Work:
    """Run torch's forward and half of its backward."""
    x, _, _, _, w_in, w_out = (leaf.detach() for leaf in case.leaves)
    router = case.router([leaf.detach() for leaf in case.leaves])
    r = route_triton(x, *router, case.spec.route, 128)
    x_PC = spread_triton(x, r.slot_TK, r.token_P, r.ends_E, 128)
    g_PC = spread_triton(case.grad_TC, r.slot_TK, r.token_P, r.ends_E, 128)
    inner = F.grouped_mm(x_PC, w_in.transpose(1, 2), offs=r.ends_E)
    dh = F.grouped_mm(g_PC, w_out, offs=r.ends_E)
    hidden = activation_backward_triton(
        "swiglu", inner, dh, None, r.token_P, r.gate_P, r.ends_E, case.loss_scale
    )
    return Work(case, r, x, w_in, w_out, x_PC, g_PC, inner, hidden.h_PF, hidden.dinner_PI)


def _spread(w: Work, rows_TC: Tensor) -> Tensor:
    return spread_triton(rows_TC, w.routing.slot_TK, w.routing.token_P, w.ends, 128)


def torch_products(w: Work) -> dict[str, Callable[[], Any]]:
    """What torch and the separate kernels do for each product, gathers included."""
    r, g = w.routing, w.case.grad_TC

    def up() -> tuple[Tensor, Tensor]:
        inner = F.grouped_mm(_spread(w, w.x_TC), w.w_in_EIC.transpose(1, 2), offs=w.ends)
        return inner, activation_triton("swiglu", inner, None, r.token_P, w.ends)

    def dh() -> Any:
        rows = F.grouped_mm(_spread(w, g), w.w_out_ECF, offs=w.ends)
        return activation_backward_triton(
            "swiglu", w.inner_PI, rows, None, r.token_P, r.gate_P, w.ends, w.case.loss_scale
        )

    return {
        "up": up,
        "down": lambda: F.grouped_mm(w.h_PF, w.w_out_ECF.transpose(1, 2), offs=w.ends),
        "dh": dh,
        "dx": lambda: F.grouped_mm(w.dinner_PI, w.w_in_EIC, offs=w.ends),
        "dw_in": lambda: F.grouped_mm(w.dinner_PI.t(), _spread(w, w.x_TC), offs=w.ends),
        "dw_out": lambda: F.grouped_mm(_spread(w, g).t(), w.h_PF, offs=w.ends),
    }


def own_product(w: Work, name: str, tiles: Tiles) -> Callable[[], Any]:
    """One of our own products."""
    r, g = w.routing, w.case.grad_TC
    calls: dict[str, Callable[[], Any]] = {
        "up": lambda: up_product("swiglu", w.x_TC, w.w_in_EIC, None, r, tiles),
        "down": lambda: down_product(w.h_PF, w.w_out_ECF, r, tiles),
        "dh": lambda: hidden_gradients(
            "swiglu", g, w.w_out_ECF, w.inner_PI, None, r, w.case.loss_scale, tiles
        ),
        "dx": lambda: dx_product(w.dinner_PI, w.w_in_EIC, r, tiles),
        "dw_in": lambda: weight_gradient(
            w.dinner_PI, w.x_TC, r, tiles, gather_a=False, gather_b=True
        ),
        "dw_out": lambda: weight_gradient(g, w.h_PF, r, tiles, gather_a=True, gather_b=False),
    }
    return calls[name]


def _first(result: Any) -> Tensor:
    """The rows to compare: inner rows, dinner rows or the only result."""
    if isinstance(result, Tensor):
        return result
    return result[1] if len(result) == 6 else result[0]  # type: ignore[no-any-return]


def difference(own: Any, plain: Any, used: int) -> float:
    """Relative distance of two results; rows behind the last group do not count."""
    a, b = _first(own).float(), _first(plain).float()
    if a.dim() == 2:
        a, b = a[:used], b[:used]
    return float(((a - b).norm() / b.norm()).item())


def _ms(call: Callable[[], Any], rounds: int = 7) -> float:
    times: list[float] = []
    for i in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(400_000)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        if i:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def dummy(base: Case) -> Work:
    """Operands of the right types and shapes that nothing had to be computed for."""
    (T, _), E = base.grad_TC.shape, base.leaves[1].shape[0]
    K, P = base.spec.route.slots(E), E * ALIGN

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    integers = torch.int32
    r = Routing(
        zeros(T, E), zeros(T, E), zeros(T, E), zeros(T, E, dtype=torch.int8), zeros(T), zeros(E),
        zeros(T, E, dtype=integers), zeros(T, K, dtype=integers), zeros(T, K),
        zeros(P, dtype=integers), zeros(P),
        torch.arange(1, E + 1, dtype=integers, device="cuda") * ALIGN,
    )  # fmt: skip
    x, w_in, w_out = (base.leaves[i].detach() for i in (0, 4, 5))
    inner = zeros(P, w_in.shape[1], dtype=torch.bfloat16)
    hidden = zeros(P, w_out.shape[2], dtype=torch.bfloat16)
    rows = zeros(P, x.shape[1], dtype=torch.bfloat16)
    return Work(base, r, x, w_in, w_out, rows, rows, inner, hidden, inner)


def _layer_jobs(base: Case, products: ProductTiles) -> list[Callable[[], Any]]:
    """Every kernel of a layer on its own, so that they compile side by side."""
    w = dummy(base)
    r, spec, router = w.routing, base.spec, base.router([leaf.detach() for leaf in base.leaves])
    T, E = r.s_TE.shape
    teach = spec.surprise is not None
    unit = base.loss_scale if teach else None
    norm = torch.zeros(T, device="cuda") if teach else None
    F_ = w.h_PF.shape[1]
    parts = triton.cdiv(F_, 128) if products.dh is not None else 1
    row = torch.zeros(parts, len(r.token_P), device="cuda")
    hidden = HiddenRows(
        w.h_PF, w.dinner_PI, None, row, row if teach else None, row if teach else None
    )
    grads = RouterGrads(
        r.s_TE, r.x_inv_T, torch.zeros(triton.cdiv(T, 32), 4, E, device="cuda"),
        torch.zeros(triton.cdiv(T, 32), 4, device="cuda"),
    )  # fmt: skip
    jobs: list[Callable[[], Any]] = [
        lambda: lesson_triton(r, hidden, norm, unit, router.log_tau, spec),
        lambda: route_triton(w.x_TC, *router, spec.route, products.align),
        lambda: combine_dx_triton(
            w.x_PC, r.slot_TK, r.gate_TK, w.x_TC, grads.a_TE, grads.centre_T, router.direction_EC
        ),
        lambda: direction_grads_triton(
            grads, w.x_TC, router.direction_EC, router.theta_E, router.log_tau, r.w_inv_E, None
        ),
        lambda: (combine_triton(w.x_PC, r.slot_TK, r.gate_TK, True), norm_triton(w.x_TC)),
        lambda: spread_triton(w.x_TC, r.slot_TK, r.token_P, r.ends_E, products.align),
    ]
    own = {f.name: getattr(products, f.name) for f in dataclasses.fields(products)}
    for name, tiles in own.items():
        if name == "dh" and tiles is not None:
            jobs.insert(
                0,
                lambda tiles=tiles: hidden_gradients(  # type: ignore[misc]
                    "swiglu", base.grad_TC, w.w_out_ECF, w.inner_PI, None, r, unit, tiles
                ),
            )
        elif tiles is not None:
            jobs.insert(0, own_product(w, name, tiles))
    return jobs


def warm(part: int, parts: int, sizes: Sequence[int], everything: bool) -> None:
    """Compile every parts-th kernel that will be timed; it only fills Triton's cache."""
    torch.set_num_threads(1)
    base = base_case(sizes, 4.0)
    quiet = changed(base, surprise=False, stride=0)
    jobs = _layer_jobs(base, MEASURED) + _layer_jobs(quiet, MEASURED)
    work = dummy(base)
    jobs.append(own_product(work, "dx", Tiles()))
    jobs.append(
        lambda: activation_backward_triton(
            "swiglu",
            work.inner_PI,
            work.h_PF,
            None,
            work.routing.token_P,
            work.routing.gate_P,
            work.ends,
            base.loss_scale,
        )
    )
    jobs.append(
        lambda: activation_triton("swiglu", work.inner_PI, None, work.routing.token_P, work.ends)
    )
    for name, found in CANDIDATES.items() if everything else ():
        jobs.extend(own_product(work, name, tiles) for tiles in found)
    for job in jobs[part::parts]:
        try:
            job()
        except Exception as e:
            print(f"warming up: {type(e).__name__}: {str(e)[:200]}", flush=True)
    torch.cuda.synchronize()


def compile_all(
    sizes: Sequence[int], processes: int, clock: Clock, everything: bool = False
) -> Callable[[], None]:
    """Start parallel processes that fill Triton's cache; returns what waits for them."""
    words = [sys.executable, "-m", "kernels.experts.sweep", "--sizes", ",".join(map(str, sizes))]
    words += ["--everything"] if everything else []
    running = [
        subprocess.Popen([*words, "--warm", str(i), str(processes)]) for i in range(processes)
    ]

    def wait() -> None:
        end = time.monotonic() + 60
        for process in running:
            try:
                process.wait(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
        clock.say(f"compiled by {processes} processes")

    return wait


def sweep_products(w: Work, clock: Clock) -> tuple[dict[str, Any], dict[str, Tiles]]:
    """Time every candidate alone; returns all figures and the best tiles of each product."""
    used = int(w.ends[-1])
    figures: dict[str, Any] = {}
    best: dict[str, Tiles] = {}
    for name, plain in torch_products(w).items():
        expected = plain()
        rows: dict[str, Any] = {"torch": _ms(plain)}
        line = [f"torch {rows['torch']:.3f}"]
        least = float("inf")
        for tiles in CANDIDATES[name]:
            t = tiles
            key = f"n{t.n} w{t.warps} s{t.stages}{' flat' if t.flatten else ''} u{t.per_unit}"
            try:
                call = own_product(w, name, tiles)
                error = difference(call(), expected, used)
                ms = _ms(call)
            except Exception as e:
                rows[key] = f"{type(e).__name__}: {str(e)[:200]}"
                line.append(f"{key}: {type(e).__name__}")
                continue
            rows[key] = {"ms": ms, "error": error}
            line.append(f"{key}: {ms:.3f}{'' if error < 6e-3 else f' WRONG {error:.1e}'}")
            if error < 6e-3 and ms < least:
                least, best[name] = ms, tiles
        figures[name] = rows
        clock.say(f"{name}: " + "; ".join(line))
    return figures, best


def sweep_layers(
    base: Case, best: dict[str, Tiles]
) -> tuple[list[tuple[float, list[str]]], ProductTiles]:
    """Time the layer with torch's products, with all of our own, and without one of each."""
    sets = [[], list(best), *[[n for n in best if n != left] for left in best], ["up", "dh"]]
    sets += [["up", "down", "dh", "dx"], ["dw_in", "dw_out"]]
    found = []
    for chosen in sets:
        products = ProductTiles(**{name: best[name] for name in chosen if name in best})
        spec = dataclasses.replace(base.spec, products=products)
        found.append((_ms(layer_call(base._replace(spec=spec)), 5), chosen))
    found.sort(key=lambda row: row[0])
    return found, ProductTiles(**{name: best[name] for name in found[0][1] if name in best})


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep and print; 1 without a CUDA device."""
    p = argparse.ArgumentParser(prog="python -m kernels.experts.sweep", description=__doc__)
    p.add_argument("--sizes", default="16384,64,2048,1024", help="tokens,experts,width,hidden")
    p.add_argument("--json", type=Path, help="write everything to this file")
    p.add_argument("--limit", type=float, default=600.0, help="seconds after which no part starts")
    p.add_argument("--processes", type=int, default=14, help="compiling at the same time")
    p.add_argument("--warm", type=int, nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--everything", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the sweep needs a CUDA device, and torch sees none")
        return 1
    sizes = [int(n) for n in a.sizes.split(",")]
    if a.warm is not None:
        warm(a.warm[0], a.warm[1], sizes, a.everything)
        return 0
    clock = Clock(a.limit)
    wait = compile_all(sizes, a.processes, clock, everything=True)
    base = base_case(sizes, 4.0, ProductTiles())
    dense = built({n: b for n, b in variants(base, 4.0).items() if n.startswith("dense")}, clock)
    wait()
    plain = built({"ours, torch's products": lambda: layer_call(base)}, clock)
    print_kernels("torch's products", layer_call(base), each=True)
    figures, best = sweep_products(prepare(base), clock)
    layers, winner = sweep_layers(base, best)
    for ms, own in layers:
        clock.say(f"layer {ms:.3f} ms with own {', '.join(own) or 'none'}")
    clock.say(f"winner: {winner}")
    spec = dataclasses.replace(base.spec, products=winner)
    best_case = base._replace(spec=spec)
    print_kernels("winner", layer_call(best_case), each=True)
    builders = {n: b for n, b in variants(best_case, 4.0).items() if not n.startswith("dense")}
    builders.pop("ours, torch's products")
    times = time_in_turns({**dense, **plain, **built(builders, clock)}, 10)
    print_times(f"{sizes}, with the winner", times)
    if a.json is not None:
        results = {"products": figures, "layers": layers, "winner": repr(winner), "times": times}
        a.json.write_text(json_module.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
