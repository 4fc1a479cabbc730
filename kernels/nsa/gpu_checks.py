"""The shapes at which the kernels are compared with fp64 on a GPU.

    python -m kernels.nsa.gpu_checks [--table '{"piece_backward": 256}'] [NUMBER ...]

runs them side by side, optionally with other fields of the table of tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from typing import Any

from kernels.nsa.triton_check import compare, random_case

CHECKS: tuple[dict[str, Any], ...] = (
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
)

FIELDS = {name for arguments in CHECKS for name in arguments}


def check_one(number: int, table: dict[str, Any]) -> dict[str, Any]:
    """Compare with fp64 in one of CHECKS; `table` replaces fields of the table of tiles."""
    from kernels.nsa import triton_config
    from kernels.nsa.triton_api import nsa_attention_triton

    triton_config._HOPPER = replace(triton_config._HOPPER, **table)
    report = compare(random_case(**CHECKS[number]), nsa_attention_triton)
    worst = max(a / max(b, 1e-12) for a, b in report.errors.values())
    gaps = (report.gap, report.plain_gap)
    failures = report.failures()
    return {
        **CHECKS[number], "errors": report.errors, "gaps": gaps, "worst": worst,
        "failures": failures,
    }  # fmt: skip


def check_apart(number: int, table: str = "{}") -> dict[str, Any]:
    """`check_one` in a process of its own: most of a check is compilation, on one core."""
    command = [
        sys.executable,
        "-m",
        "kernels.nsa.gpu_checks",
        "--here",
        "--table",
        table,
        str(number),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {**CHECKS[number], "worst": float("nan"), "failures": [lines[-1][:300]]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_all(
    workers: int, table: str = "{}", numbers: Sequence[int] = range(len(CHECKS))
) -> Iterator[dict[str, Any]]:
    """Run and print these checks, `workers` at a time; yields what each found."""
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(check_apart, numbers, repeat(table)):
            bad = found["failures"]
            arguments = {k: v for k, v in found.items() if k in FIELDS}
            gaps = ", gives away {:.2g} (plain {:.2g})".format(*found.get("gaps", (0.0, 0.0)))
            state = "FAILED" if bad else "ok"
            print(
                f"check {arguments}: {state}, worst {found['worst']:.2f}x plain{gaps}", flush=True
            )
            for line in bad:
                print(f"  {line}")
            yield found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one check for `check_apart`, or several of them."""
    parser = argparse.ArgumentParser(prog="python -m kernels.nsa.gpu_checks")
    parser.add_argument("numbers", type=int, nargs="*", default=list(range(len(CHECKS))))
    parser.add_argument("--table", default="{}", help="fields of the table of tiles, JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--here", action="store_true", help="one check, in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(check_one(options.numbers[0], json.loads(options.table))))
        return 0
    results = list(check_all(options.workers, options.table, options.numbers))
    return int(any(found["failures"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
