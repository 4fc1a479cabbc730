"""Which tiles are fastest: every variant is checked against fp64 first, then timed in turns.

    python -m kernels.nsa.sweep --tokens 65536 --json sweep.json [--only grad_q score]

Needs a Hopper GPU. Checks run in processes of their own, many at a time, because nearly all of
their time is compilation; the timing process then finds the kernels compiled.
"""

from __future__ import annotations

import argparse
import base64
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernels.nsa.triton_config import KernelConfigs, TileConfig

if TYPE_CHECKING:
    from kernels.nsa.triton_check import Case

Plan = tuple[str, str]
"""A field of the table and the value it takes, as text; ("base", "base") is the table itself."""

STAGE_OF = {
    "forward": "forward compressed",
    "window_forward": "forward window alone",
    "combine_rows": "forward selected+window+merge",
    "piece_forward": "forward of it selected",
    "grad_q": "backward dq+merge",
    "grad_kv": "backward compressed dkv",
    "window_grad_kv": "backward window dkv",
    "score": "forward importance+topk",
    "score_chunk": "forward importance+topk",
    "selected_forward": "forward of it selected",
    "selected_backward": "backward selected",
    "piece_backward": "backward selected",
    "partial_rows": "backward selected",
}
"""The stage of `bench.stages` that shows what a field of the table is worth."""

VARIANTS: dict[str, tuple[Any, ...]] = {
    "grad_q": (TileConfig(64, 64, 4, 2),),
    "window_forward": (TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3, True)),
    "combine_rows": (8, 32),
    "score": tuple(TileConfig(*x) for x in ((64, 128, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3))),
    "selected_forward": (
        TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 3, True), TileConfig(64, 64, 4, 4, True),
    ),
    "selected_backward": (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2, True)),
    "forward": (TileConfig(128, 128, 8, 3), TileConfig(128, 64, 8, 3, True)),
    "grad_kv": (TileConfig(64, 128, 8, 3), TileConfig(64, 128, 8, 2, True)),
    "window_grad_kv": (TileConfig(64, 64, 4, 2), TileConfig(64, 128, 8, 3, True)),
    "piece_forward": (32, 128),
    "piece_backward": (256, 1024),
    "partial_rows": (4096 * 64 * 16, 16384 * 64 * 16),
}  # fmt: skip


def check(configs: KernelConfigs, heads: int, groups: int, dim: int) -> list[str]:
    """Errors of forward and backward under these tiles."""
    from kernels.nsa import triton_config
    from kernels.nsa.triton_api import nsa_attention_triton
    from kernels.nsa.triton_check import compare, random_case

    triton_config._HOPPER = configs
    case = random_case([1, 300, 723], heads, groups, dim)
    return compare(case, nsa_attention_triton).failures()


def check_apart(configs: KernelConfigs, shape: tuple[int, int, int], seconds: int) -> list[str]:
    """`check` in a process of its own: a kernel that hangs or breaks the device ends with it."""
    call = base64.b64encode(pickle.dumps((configs, *shape))).decode()
    command = [sys.executable, "-m", "kernels.nsa.sweep", "--one", call]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [f"no result after {seconds} s"]
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "died"]
    lines: list[str] = json.loads(done.stdout.splitlines()[-1])
    return lines


def once(launch: Any) -> float:
    """Milliseconds of one launch by CUDA events."""
    from kernels.nsa.bench import hold_device

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    hold_device()
    events[0].record()
    launch()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1]))


def check_all(
    plans: dict[Plan, KernelConfigs], shape: tuple[int, int, int], workers: int
) -> dict[Plan, list[str]]:
    """Check every plan; name to what is wrong with it."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = {
            key: pool.submit(check_apart, configs, shape, 90) for key, configs in plans.items()
        }
        return {key: future.result() for key, future in waiting.items()}


def time_field(
    field: str, plans: dict[Plan, KernelConfigs], case: Case, rounds: int
) -> dict[str, list[float]]:
    """Time the stage that the field matters to under every plan, in turns; value to ms."""
    from kernels.nsa.bench import stages

    direction, name = STAGE_OF[field].split(" ", 1)
    launches = {
        value: stages(case, configs)[direction == "backward"][name][0]
        for (varied, value), configs in plans.items()
        if varied in {"base", field}
    }
    times: dict[str, list[float]] = {value: [] for value in launches}
    for i in range(rounds + 1):
        for value, launch in launches.items():
            ms = once(launch)
            if i:
                times[value].append(ms)
    return times


def fastest(
    base: KernelConfigs, plans: dict[Plan, KernelConfigs], times: dict[str, dict[str, list[float]]]
) -> KernelConfigs:
    """Take over the fastest value of every field but `partial_rows`, which costs memory."""
    for field, by_value in times.items():
        best = min(by_value, key=lambda value: statistics.median(by_value[value]))
        if best != "base" and field != "partial_rows":
            base = replace(base, **{field: getattr(plans[field, best], field)})
    return base


def shape_of(text: str) -> tuple[int, int, int]:
    """Parse TOKENS,HEADS,GROUPS."""
    tokens, heads, groups = (int(x) for x in text.split(","))
    return tokens, heads, groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep; returns 1 when a variant is wrong."""
    parser = argparse.ArgumentParser(prog="python -m kernels.nsa.sweep")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="fields of the table")
    parser.add_argument(
        "--whole", nargs="*", type=shape_of, default=[], metavar="TOKENS,HEADS,GROUPS",
        help="time all of NSA beside dense attention at these shapes, in the end",
    )  # fmt: skip
    parser.add_argument("--stages", action="store_true", help="and every stage of them")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(check(*pickle.loads(base64.b64decode(options.one)))))
        return 0
    from kernels.nsa import triton_config
    from kernels.nsa.bench import print_times, time_case
    from kernels.nsa.triton_check import random_case

    default = base = triton_config.kernel_configs()
    shape = (options.heads, options.groups, options.dim)
    begin = time.perf_counter()
    plans: dict[Plan, KernelConfigs] = {("base", "base"): base}
    for field in options.only:
        for value in VARIANTS[field]:
            plans[field, str(value)] = replace(base, **{field: value})
    wrong = check_all(plans, shape, options.workers)
    for key, lines in wrong.items():
        if lines:
            print(f"WRONG {key}: {'; '.join(lines)}")
    print(f"{len(plans)} variants checked in {time.perf_counter() - begin:.0f} s", flush=True)
    right = {key: configs for key, configs in plans.items() if not wrong[key]}
    case = random_case([options.tokens], *shape)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "times": {}}
    for field in options.only:
        results["times"][field] = time_field(field, right, case, options.rounds)
        print(f"{STAGE_OF[field]} by {field}:")
        for value, found in results["times"][field].items():
            print(f"  {statistics.median(found):8.3f} ms  {min(found):8.3f}  {value}", flush=True)
    base = fastest(base, right, results["times"])
    print(base)
    for tokens, heads, groups in options.whole:
        case = random_case([tokens], heads, groups, options.dim)
        for name, configs in (("the table", default), ("the best", base)):
            triton_config._HOPPER = configs
            print(f"\n{name}:", end="")
            whole = time_case(case, rounds=3, dense=("cudnn",), by_stage=options.stages)
            print_times(whole)
            results.setdefault("whole", []).append({"tiles": name, **whole})
    results["wrong"] = {" ".join(k): v for k, v in wrong.items() if v}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return int(bool(results["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
