"""The shapes at which every implementation is compared with fp64, one process each.

    python -m kernels.nsa.checks [--table '{"piece_backward": 256}'] [NUMBER ...]

runs those for a GPU side by side, optionally with other fields of the table of tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.nsa.blocked import nsa_blocked, selected_blocks
from kernels.nsa.naive import nsa_naive
from kernels.nsa.selection import block_indices
from kernels.nsa.spec import NsaCall, NsaSpec
from kernels.nsa.triton_check import Case, compare, random_case

Check = dict[str, Any]
"""Arguments of `random_case`, `spec` as a mapping and `dtype` as a name, and `implementation`:
"triton" (the default on a GPU), "blocked" (on a CPU) or "naive"."""

CHECKS: tuple[Check, ...] = (
    {"lengths": [1000], "heads": 16, "groups": 1, "dim": 128},
    {"lengths": [1, 15, 31, 32, 33, 63, 64, 65, 127, 1000], "heads": 8, "groups": 2, "dim": 64},
    {"lengths": [700, 1, 1200], "heads": 4, "groups": 2, "dim": 96, "mean": True},
    {"lengths": [129, 1500], "heads": 4, "groups": 4, "dim": 128},
    {"lengths": [1, 200, 4096], "heads": 16, "groups": 1, "dim": 128},
    {"lengths": [900], "heads": 4, "groups": 2, "dim": 64},
    {"lengths": [900], "heads": 8, "groups": 1, "dim": 96},
    {"lengths": [1300], "heads": 8, "groups": 2, "dim": 128, "magnitude": 3e3},
    {"lengths": [1300], "heads": 8, "groups": 2, "dim": 128, "equal": True},
    {"lengths": [1, 15, 31, 32, 33, 63, 64, 65, 127, 1000], "heads": 16, "groups": 1, "dim": 128},
    {"lengths": [1, 63, 1500], "heads": 16, "groups": 2, "dim": 128},
    {"lengths": [1300], "heads": 16, "groups": 1, "dim": 128, "magnitude": 3e3},
    {"lengths": [1300], "heads": 16, "groups": 1, "dim": 64, "equal": True},
    {"lengths": [65, 700], "heads": 12, "groups": 3, "dim": 64},
    # As above, but rows of [H, T] start on 16 bytes: the Gluon kernels take these.
    {"lengths": [1, 15, 31, 32, 33, 63, 64, 65, 127, 1105], "heads": 16, "groups": 1, "dim": 128},
    {"lengths": [64, 700], "heads": 12, "groups": 3, "dim": 64},
    *(
        {"lengths": lengths, "heads": heads, "groups": groups, "dim": 192, "value_dim": 128}
        for lengths, heads, groups in (
            ([1100], 16, 1),
            ([1, 63, 500], 8, 1),
            ([1, 15, 31, 32, 33, 65, 127, 700], 8, 2),
            ([300], 4, 2),
            ([129, 600], 2, 2),
        )
    ),
    {"lengths": [900], "heads": 16, "groups": 1, "dim": 192, "value_dim": 128, "equal": True},
    # As the model calls them: views of one [T, 3, G, D], of several groups or of one.
    {"lengths": [200, 1400], "heads": 16, "groups": 4, "dim": 128, "layout": "model"},
    {"lengths": [1500], "heads": 16, "groups": 1, "dim": 128, "layout": "model"},
    {"lengths": [65, 1300], "heads": 8, "groups": 2, "dim": 64, "layout": "model"},
    {"lengths": [1300], "heads": 16, "groups": 2, "dim": 128, "layout": "shared"},
    {"lengths": [1, 1300], "heads": 16, "groups": 1, "dim": 128, "dtype": "float16"},
    {"lengths": [900], "heads": 8, "groups": 2, "dim": 128, "value_dim": 64},
    *(
        {"lengths": [33, 900], "heads": 16, "groups": 2, "dim": 128, "spec": spec}
        for spec in (
            {"selected": 5},
            {"selected": 32},
            {"select": 32, "selected": 8, "window": 100},
            {"block": 16, "stride": 16, "select": 128, "selected": 4},
        )
    ),
)
"""Of the Triton kernels, on a GPU; longer than 1,024 tokens, or not every block is selected."""

SHORT: Check = {"lengths": [1, 15, 31, 33, 64, 65, 300], "spec": {"selected": 4}}
CPU_CHECKS: tuple[Check, ...] = (
    {**SHORT, "heads": 4, "groups": 4, "dim": 32, "value_dim": 16, "mean": True},
    {**SHORT, "heads": 8, "groups": 2, "dim": 32, "layout": "shared"},
)
"""Of the blocked path in bf16, at sizes that take seconds."""


SECONDS = 300
"""After which a check has hung: nearly all of one is compilation, on one core."""


def checks_for(
    heads: int, groups: int, dim: int, value_dim: int | None, *, gpu: bool
) -> list[Check]:
    """Return all checks of this machine: first those of these heads and widths, then the fixed."""
    shape = {"heads": heads, "groups": groups, "dim": dim, "value_dim": value_dim}
    if gpu:
        own = {"lengths": [65, 1400], "layout": "model", **shape}
        fixed: Sequence[Check] = CHECKS
    else:
        own = {**SHORT, "dtype": "float32", **shape}
        fixed = CPU_CHECKS
    names = ("triton", "blocked") if gpu else ("blocked", "naive")
    return [*({**own, "implementation": name} for name in names), *fixed]


def case_of(check: Check, device: str) -> Case:
    """Draw the inputs of a check."""
    arguments = {k: v for k, v in check.items() if k != "implementation"}
    arguments["spec"] = NsaSpec(**check.get("spec", {}))
    arguments["dtype"] = getattr(torch, check.get("dtype", "bfloat16"))
    return random_case(**arguments, device=device)


def blocked(call: NsaCall, *, scale: float | None, stats: dict[str, Tensor]) -> Tensor:
    """`nsa_blocked`, with its selection in `stats`."""
    stats["selected_TGK"] = selected_blocks(call, scale=scale)
    return nsa_blocked(call, scale=scale)


def naive(call: NsaCall, *, scale: float | None, stats: dict[str, Tensor]) -> Tensor:
    """`nsa_naive`, with its selection in `stats`."""
    result = nsa_naive(call, scale=scale)
    parts, base = [], 0
    for chosen_nGJ in result.selection:
        parts.append(block_indices(chosen_nGJ, base, call.spec.selected))
        base += chosen_nGJ.shape[2]
    stats["selected_TGK"] = torch.cat(parts)
    return result.out_THE.to(call.q_THD.dtype)


def implementation_of(check: Check, device: str) -> Callable[..., Tensor]:
    """Return what a check runs."""
    name = check.get("implementation", "blocked" if device == "cpu" else "triton")
    if name != "triton":
        return {"blocked": blocked, "naive": naive}[name]
    from kernels.nsa.triton_api import nsa_attention_triton

    return nsa_attention_triton


def check_one(check: Check, device: str, table: dict[str, Any]) -> Check:
    """Compare with fp64; `table` replaces fields of the kernels' table of tiles.

    Returns:
        "failures" (lines), "errors" and "gaps" (see `Report`), and "worst", the largest error in
        units of the plain reference's.
    """
    if table:
        from kernels.nsa import triton_config

        triton_config._HOPPER = replace(triton_config._HOPPER, **table)
    report = compare(case_of(check, device), implementation_of(check, device))
    return {
        "errors": report.errors,
        "gaps": (report.gap, report.plain_gap),
        "worst": max(own / max(plain, 1e-12) for own, plain in report.errors.values()),
        "failures": report.failures(),
    }


def check_apart(check: Check, device: str, table: str = "{}", seconds: int = SECONDS) -> Check:
    """`check_one` in a process of its own, which may hang or break the device.

    Returns:
        The check and what was found; without a result "failures" says why and "worst" is NaN.
    """
    # Those on a CPU run side by side, and are small: more threads each would only wait.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if device == "cpu" else None
    task = json.dumps([check, device])
    command = [sys.executable, "-m", "kernels.nsa.checks", "--table", table, "--one", task]
    nothing = {**check, "worst": float("nan")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {**nothing, "failures": [f"no result after {seconds} s"]}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {**nothing, "failures": [lines[-1][:300]]}
    return {**check, **json.loads(done.stdout.splitlines()[-1])}


def check_all(
    checks: Sequence[Check],
    device: str,
    workers: int,
    table: str = "{}",
    seconds: int = SECONDS,
) -> Iterator[Check]:
    """Run and print these checks, `workers` at a time; yields what `check_apart` says of each."""
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(check_apart, check, device, table, seconds) for check in checks]
        for check, future in zip(checks, running, strict=True):
            found = future.result()
            bad = found["failures"]
            gaps = ", gives away {:.2g} (plain {:.2g})".format(*found.get("gaps", (0.0, 0.0)))
            state = "FAILED" if bad else "ok"
            print(f"check {check}: {state}, worst {found['worst']:.2f}x plain{gaps}", flush=True)
            for line in bad:
                print(f"  {line}", flush=True)
            yield found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one check for `check_apart`, or several of CHECKS."""
    parser = argparse.ArgumentParser(prog="python -m kernels.nsa.checks")
    parser.add_argument("numbers", type=int, nargs="*", default=list(range(len(CHECKS))))
    parser.add_argument("--table", default="{}", help="fields of the table of tiles, JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a check")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        check, device = json.loads(options.one)
        print(json.dumps(check_one(check, device, json.loads(options.table))))
        return 0
    chosen = [CHECKS[number] for number in options.numbers]
    results = list(check_all(chosen, "cuda", options.workers, options.table, options.seconds))
    return int(any(found["failures"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
