"""Runs the Triton layer in Triton's interpreter, on CPU, and prints what was wrong as JSON.

A process of its own, because TRITON_INTERPRET is read when kernels are defined. Uninitialised
memory is NaN (or the largest integer) here, so that an element that no kernel wrote shows.

    TRITON_INTERPRET=1 python -m tests.kernels.experts_triton_worker NAME...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels.experts import Activation, SurpriseSpec
from kernels.experts.spec import ProductTiles, Tiles
from kernels.experts.triton_check import compare, decide, random_case, run_triton

SPEC = SurpriseSpec(temperature=0.7, ce_weight=0.3, coefficient=0.5)


OWN = ProductTiles(*[Tiles()] * 6)


def check(*sizes: int, **kwargs: Any) -> list[str]:
    """Compare a random layer with fp64; return what is off."""
    case = random_case(*sizes, **{"surprise": SPEC, "stride": 4, **kwargs})
    return compare(case).failures(gap=3.0, floor=1e-5)


def narrow(activation: Activation, products: ProductTiles) -> list[str]:
    """Compare with fp64 where deltas in bf16 are so small that 1 + delta in bf16 is 1."""
    case = random_case(40, 5, 16, 24, scaled=True, activation=activation, products=products)
    *leaves, delta = case.leaves
    small = torch.full_like(delta, 1 / 512, dtype=torch.bfloat16).requires_grad_()
    report = compare(case._replace(leaves=[*leaves, small]))
    # That gradient is rounded to bf16.
    assert report.ours.pop("delta") < 2**-8
    return report.failures(gap=3.0, floor=1e-5)


def repeats() -> list[str]:
    """Route, run and go back twice; compare bit for bit."""
    case = random_case(70, 6, 16, 24, surprise=SPEC, stride=3)
    results = []
    for _ in range(2):
        routing = decide(case)
        y = run_triton(case, routing)
        results.append([y, *torch.autograd.grad(y, case.leaves, case.grad_TC)])
    return [str(i) for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)]


CASES: dict[str, Callable[[], list[str]]] = {
    "swiglu": lambda: check(70, 6, 32, 24),
    "squared relu": lambda: check(70, 6, 32, 24, activation="relu2"),
    "hidden delta": lambda: check(40, 5, 16, 24, scaled=True),
    "hidden delta, squared relu": lambda: check(
        40, 5, 16, 24, scaled=True, activation="relu2", stride=0
    ),
    "small hidden delta in bf16": lambda: narrow("swiglu", ProductTiles()),
    "small hidden delta in bf16, own products": lambda: narrow("relu2", OWN),
    "no surprise": lambda: check(40, 6, 16, 24, surprise=None, surrogate_width=0.0),
    "balanced top-k": lambda: check(
        40, 6, 16, 24, surprise=None, surrogate_width=0.0, fewest=2, most=2, bias_weighs=False,
        stride=0,
    ),
    "output_grad": lambda: check(
        40, 6, 16, 24, surprise=SurpriseSpec(kind="output_grad", coefficient=0.5)
    ),
    "surprise without gates": lambda: check(
        40, 6, 16, 24, surprise=SurpriseSpec(gated=False, coefficient=0.5)
    ),
    "surprise as it is": lambda: check(
        40, 6, 16, 24,
        surprise=SurpriseSpec(normalise="none", coefficient=0.5, kl_weight=0.5, ce_weight=0.0),
    ),
    "all tokens to one expert": lambda: check(70, 6, 16, 24, favour=2),
    "all experts fire": lambda: check(20, 4, 16, 16, most=4, mean=40.0),
    "more experts than a block": lambda: check(20, 40, 16, 16, most=8, mean=4.0),
    "closed experts": lambda: check(40, 6, 16, 24, closed=3, stride=1),
    "packed sequences": lambda: check(70, 6, 16, 24, sequence=23),
    "one token": lambda: check(1, 4, 16, 16, stride=1),
    "width not a power of two": lambda: check(20, 4, 48, 40),
    "many blocks of tokens": lambda: check(500, 20, 16, 16),
    "own products": lambda: check(70, 6, 32, 24, products=OWN),
    "own products, squared relu, hidden delta": lambda: check(
        40, 5, 48, 40, products=OWN, activation="relu2", scaled=True
    ),
    "own products, hidden delta": lambda: check(40, 5, 16, 24, products=OWN, scaled=True),
    "own products, all tokens to one expert": lambda: check(
        200, 3, 16, 24, products=OWN, favour=1, surprise=None, surrogate_width=0.0
    ),
    "own products with several tiles": lambda: check(
        150, 2, 48, 40, products=ProductTiles(*[Tiles(n=32, k=32, m=16, flatten=False)] * 6)
    ),
    "own and torch's products": lambda: check(
        40, 4, 16, 24, products=ProductTiles(down=Tiles(), dw_in=Tiles())
    ),
    "two runs are bitwise equal": repeats,
}  # fmt: skip


def main(names: list[str]) -> None:
    """Run the named cases, all by default."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = {}
    for name in names or CASES:
        start = time.process_time()
        results[name] = CASES[name]()
        print(f"{name}: {time.process_time() - start:.1f} s {results[name]}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
