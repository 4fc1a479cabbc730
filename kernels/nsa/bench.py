"""`tiny-onn bench attention`: check NSA against fp64, and time it by stage beside dense attention.

Times are medians of CUDA-event intervals; ours and dense are timed in turns in one process, with
the launches queued before the device begins, as in training, so that the host's own time does not
count. The floor of a stage is the longer of its arithmetic (tiles of the masks' edges not counted)
at the card's dense bf16 rate and its inputs and outputs once at the memory's rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json as json_module
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.checks import SECONDS, check_all, checks_for
from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_check import Case, random_case

Stage = tuple[Callable[[], Any], float, float]
"""Launch, floating-point operations, bytes of inputs and outputs."""

PEAK_TFLOPS = 989.0
PEAK_TBYTES = {"H100": 3.35, "H200": 4.8}
"""Data sheet of the SXM cards; other cards count as an H100."""

QUEUE_CYCLES = 10_000_000
"""How long the device waits before a timed region: longer than the host takes to launch one."""


def visible_pairs(docs: Documents, spec: NsaSpec) -> tuple[float, float, float]:
    """(query, key) pairs of the compressed, selected and window branch, and so their arithmetic."""
    compressed = selected = window = 0.0
    for n in docs.lengths:
        t = torch.arange(n, dtype=torch.float64)
        compressed += float(((t - spec.block + 1).div(spec.stride).floor() + 1).clamp(min=0).sum())
        reach = t.div(spec.select).floor().clamp(max=spec.selected - 1)
        selected += float((reach * spec.select + t % spec.select + 1).sum())
        window += float((t + 1).clamp(max=spec.window).sum())
    return compressed, selected, window


def stages(  # noqa: PLR0915  (a list of launches)
    case: Case, configs: Any = None
) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """Return the forward's and the backward's stages: name to (launch, floating-point operations).

    Each launch runs alone on the outputs of one complete forward; `configs` replaces the table.
    """
    from kernels.nsa.triton_compress import compress, compress_backward
    from kernels.nsa.triton_config import kernel_configs
    from kernels.nsa.triton_delta import branch_deltas
    from kernels.nsa.triton_finish import finish_forward
    from kernels.nsa.triton_interval import interval_forward
    from kernels.nsa.triton_interval_grad_kv import interval_grad_kv
    from kernels.nsa.triton_interval_grad_q import interval_grad_q
    from kernels.nsa.triton_layout import packed_layout
    from kernels.nsa.triton_ops import list_tokens
    from kernels.nsa.triton_select import block_lists, cut_pieces, select_blocks
    from kernels.nsa.triton_selected import new_partials, selected_partials
    from kernels.nsa.triton_selected_grad import SelectedGrad

    q, kc, vc, ks, vs, kw, vw, gates, *maps = (x.detach() for x in case.tensors)
    T, H, D = q.shape
    G, DV = vs.shape[1:]
    spec, layout = case.spec, packed_layout(case.docs, case.spec)
    configs = kernel_configs(D) if configs is None else configs
    scale = D**-0.5
    token, seen = layout.tokens, layout.window
    maps = maps or [None] * 4  # type: ignore[list-item]
    k = compress(kc, maps[0], maps[1], layout, spec)
    v = compress(vc, maps[2], maps[3], layout, spec)
    lse = torch.empty(2, H, T, dtype=torch.float32, device=q.device)

    def forward_compressed() -> Tensor:
        return interval_forward(q, k, v, token[2], token[3], lse[0], scale, configs.forward)

    compressed = forward_compressed()
    chunk = list_tokens(T, H, spec, configs)
    selected, keys = select_blocks(q, k, lse[0], layout, spec, scale, chunk, configs)
    lists = block_lists(keys, layout.n_blocks, chunk)

    def forward_selected() -> None:
        pieces = cut_pieces(lists, G, layout.n_blocks, spec.selected, configs.piece_forward)
        partials = new_partials(q, DV, lists, spec.selected)
        for c in range(lists.n_chunks):
            selected_partials(q, ks, vs, partials, lists, pieces, c, layout, spec, scale, configs)

    def forward_window() -> Tensor:
        return interval_forward(q, kw, vw, seen[0], seen[1], lse[1], scale, configs.window_forward)

    def forward_finish() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return finish_forward(
            q, (ks, vs), (kw, vw), gates, compressed, selected, lists, lse[1], layout, spec,
            scale, configs,
        )  # fmt: skip

    out, slc, window, lse_slc = forward_finish()
    do = torch.randn_like(out)
    delta, folded, delta_slc, folded_slc, _ = branch_deltas(
        do, compressed, slc, window, gates, lse, lse_slc, configs
    )
    dq = torch.empty_like(q)
    grad = SelectedGrad(q, ks, vs, do, folded_slc, delta_slc, lists, layout, spec, scale, configs)

    def backward_selected() -> None:
        for c in range(lists.n_chunks):
            grad.chunk(c)
        grad.keys_and_values()

    def grad_q(first: bool, second: bool, third: bool) -> None:
        for c in range(lists.n_chunks):
            interval_grad_q(
                dq, q, do, grad.partials if third else None, selected, token[0], spec.select,
                (c * chunk, min(T, (c + 1) * chunk)), (k, v, token[2], token[3]),
                (kw, vw, seen[0], seen[1]), folded, delta, scale, configs.grad_q,
                branches=(first, second),
            )  # fmt: skip

    def grad_window() -> tuple[Tensor, Tensor]:
        return interval_grad_kv(
            q, kw, vw, do, folded[1], delta[1], seen[2], seen[3], scale,
            configs.window_grad_kv, splits=1,
        )  # fmt: skip

    def grad_compressed() -> tuple[Tensor, Tensor]:
        return interval_grad_kv(
            q, k, v, do, folded[0], delta[0], layout.slots[2], layout.slots[3], scale,
            configs.grad_kv, splits=H // G,
        )  # fmt: skip

    dk, dv = grad_compressed()
    backward_selected()

    def compress_both() -> None:
        compress(kc, maps[0], maps[1], layout, spec)
        compress(vc, maps[2], maps[3], layout, spec)

    def compress_both_backward() -> None:
        compress_backward(dk, kc, maps[0], maps[1], layout, spec, keys=True)
        compress_backward(dv, vc, maps[2], maps[3], layout, spec)

    pairs_c, pairs_s, pairs_w = (2.0 * H * x for x in visible_pairs(case.docs, spec))
    phi = 2.0 * layout.n_slots * G * spec.block * (D * D + DV * DV) if maps[0] is not None else 0.0
    # Bytes of q and the like, of o and the like, of keys and values, and of the partials.
    qs, os = 2.0 * T * H * D, 2.0 * T * H * DV
    kv, slots = 2.0 * T * G * (D + DV), 2.0 * layout.n_slots * G * (D + DV)
    K = spec.selected
    forward: dict[str, Stage] = {
        "compress": (compress_both, phi, kv + slots),
        "compressed": (forward_compressed, pairs_c * (D + DV), qs + os + slots),
        "importance+topk": (
            lambda: select_blocks(q, k, lse[0], layout, spec, scale, chunk, configs),
            pairs_c * D,
            qs + slots / 2,
        ),
        "lists": (lambda: block_lists(keys, layout.n_blocks, chunk), 0.0, 8.0 * T * G * K),
        "selected+window+merge": (
            forward_finish,
            (pairs_s + pairs_w) * (D + DV),
            2 * qs + 2 * kv + (4 + 2 * K) * os,
        ),
        "of it selected": (forward_selected, pairs_s * (D + DV), qs + kv + K * os),
        "window alone": (forward_window, pairs_w * (D + DV), qs + os + kv),
    }
    backward: dict[str, Stage] = {
        "delta": (
            lambda: branch_deltas(do, compressed, slc, window, gates, lse, lse_slc, configs),
            0.0,
            4 * os,
        ),
        "selected": (
            backward_selected, pairs_s * (3 * D + 2 * DV), qs + os + 3 * kv + K * qs
        ),
        "dq+merge": (
            lambda: grad_q(True, True, True), (pairs_c + pairs_w) * D, (2 + K) * qs + os + kv
        ),
        "of it compressed dq": (lambda: grad_q(True, False, False), pairs_c * D, 2 * qs + os),
        "of it window dq": (lambda: grad_q(False, True, False), pairs_w * D, 2 * qs + os + kv),
        "compressed dkv": (grad_compressed, pairs_c * (2 * D + 2 * DV), qs + os + 3 * slots),
        "window dkv": (grad_window, pairs_w * (2 * D + 2 * DV), qs + os + 2 * kv),
        "compress": (compress_both_backward, 2 * phi, 2 * kv + 2 * slots),
    }  # fmt: skip
    return forward, backward


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def hold_device() -> None:
    """Keep the device busy while the host launches what is to be timed."""
    torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]


def milliseconds(launch: Callable[[], Any], rounds: int = 5, warmup: int = 1) -> float:
    """Median time of one launch by CUDA events."""
    times: list[float] = []
    for i in range(warmup + rounds):
        start, end = _event(), _event()
        hold_device()
        start.record()
        launch()
        end.record()
        end.synchronize()
        if i >= warmup:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


class _Pair:
    """Forward and backward of one implementation, timed apart, with its peak memory."""

    def __init__(self, run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
        self.run, self.leaves = run, leaves
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.peak = 0

    def once(self, record: bool) -> None:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        events = [_event() for _ in range(4)]
        hold_device()
        events[0].record()
        out = self.run()
        events[1].record()
        do = torch.randn_like(out)
        hold_device()
        events[2].record()
        torch.autograd.grad(out, self.leaves, do)
        events[3].record()
        events[3].synchronize()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - base)
        if record:
            self.forward.append(events[0].elapsed_time(events[1]))
            self.backward.append(events[2].elapsed_time(events[3]))

    @property
    def median(self) -> tuple[float, float]:
        return statistics.median(self.forward), statistics.median(self.backward)


def _dense(backend: str, case: Case) -> _Pair:
    """Causal attention by one of torch's backends, one call per document."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    leaves = [x.detach().requires_grad_() for x in case.tensors[:3]]
    H, G = leaves[0].shape[1], leaves[1].shape[1]
    lengths = list(case.docs.lengths)

    def run() -> Tensor:
        parts = [torch.split(x.transpose(0, 1)[None], lengths, dim=2) for x in leaves]
        with sdpa_kernel(chosen):
            outputs = [
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
                for q, k, v in zip(*parts, strict=True)
            ]
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    return _Pair(run, leaves)


def _foreign(case: Case) -> _Pair | None:
    """flash-linear-attention's NSA, None where it is not installed or does not take the case.

    It compresses by the mean of 64 tokens without overlap, shares keys and values between the
    branches, wants 16 query heads per group, and has a sliding branch only beside flash-attn.
    """
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.nsa import parallel_nsa

    leaves = [x.detach().requires_grad_() for x in (*case.tensors[:3], case.tensors[7])]
    if leaves[0].shape[1] // leaves[1].shape[1] < 16:
        return None
    spec, docs = case.spec, case.docs
    window = spec.window if importlib.util.find_spec("flash_attn") else 0
    cu_seqlens = docs.cu_seqlens.long() if len(docs.lengths) > 1 else None

    def run() -> Tensor:
        q, k, v, gates = (x[None] for x in leaves)
        out: Tensor = parallel_nsa(
            q, k, v, *gates.unbind(-1), block_counts=spec.selected, block_size=spec.select,
            window_size=window, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return out[0]

    return _Pair(run, leaves[: 4 if window else 3])


def time_case(
    case: Case,
    *,
    rounds: int = 5,
    dense: Sequence[str] = ("cudnn", "flash"),
    by_stage: bool = True,
) -> dict[str, Any]:
    """Time whole NSA, dense attention and others' NSA in turns, then every stage of ours, in ms."""
    from kernels.nsa.triton_api import nsa_attention_triton

    pairs = {"nsa": _Pair(lambda: nsa_attention_triton(case.call()), case.tensors)}
    pairs |= {name: _dense(name, case) for name in dense}
    foreign = _foreign(case)
    if foreign is not None:
        pairs["fla"] = foreign
    for i in range(rounds + 1):
        for pair in pairs.values():
            pair.once(record=i > 0)
    whole = {
        name: {
            "forward_ms": pair.median[0],
            "backward_ms": pair.median[1],
            "peak_gib": pair.peak / 2**30,
        }
        for name, pair in pairs.items()
    }
    table = {}
    card = torch.cuda.get_device_name()
    rate = next((x for name, x in PEAK_TBYTES.items() if name in card), PEAK_TBYTES["H100"])
    parts = stages(case) if by_stage else ({}, {})
    for direction, group in zip(("forward", "backward"), parts, strict=True):
        for name, (launch, flops, n_bytes) in group.items():
            ms = milliseconds(launch, rounds)
            floor = max(flops / PEAK_TFLOPS, n_bytes / rate) / 1e9
            table[f"{direction} {name}"] = {
                "ms": ms, "tflops": flops / ms / 1e9, "tbytes": n_bytes / ms / 1e9,
                "of_floor": floor / ms,
            }  # fmt: skip
    T, H, D = case.tensors[0].shape
    return {
        "tokens": T,
        "documents": len(case.docs.lengths),
        "heads": H,
        "groups": case.tensors[1].shape[1],
        "dim": D,
        "whole": whole,
        "stages": table,
    }


def launch_stages(case: Case) -> None:
    """Launch every stage once, marked for a profiler."""
    forward, backward = stages(case)
    for launch, *_ in (*forward.values(), *backward.values()):
        launch()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    for launch, *_ in (*forward.values(), *backward.values()):
        launch()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def bench_attention(
    lengths: Sequence[int] = (8192, 32768, 65536),
    heads: int = 64,
    groups: int = 4,
    dim: int = 128,
    *,
    value_dim: int | None = None,
    check: bool = False,
    workers: int = 8,
    seconds: int = SECONDS,
    json: str | Path | None = None,
    rounds: int = 5,
    documents: int = 0,
    dense: Sequence[str] = ("cudnn", "flash"),
    profile: bool = False,
) -> int:
    """Check (`check`) and time NSA; print a table, write everything to `json`; return an exit code.

    With `documents`, a pack of that many of 100 to 2,000 tokens is timed beside one sequence as
    long. `profile` launches every stage once, between the marks that a profiler started with
    `ncu --profile-from-start off` waits for. Checked are every implementation that runs here, at
    fixed shapes and at these heads and widths (and short lengths: the oracle's time is quadratic);
    a check that takes more than `seconds` has failed. Without a CUDA device nothing is timed.
    Returns 1 when a check fails, or there is neither a device nor anything to check.
    """
    gpu = torch.cuda.is_available()
    if not gpu and not check:
        print("bench attention needs a CUDA device, and torch sees none; --check needs none")
        return 1
    device = torch.cuda.get_device_name() if gpu else "cpu"
    results: dict[str, Any] = {"device": device, "checks": [], "times": []}
    failed = 0
    if check:
        checks = checks_for(heads, groups, dim, value_dim, gpu=gpu)
        workers = workers if gpu else min(workers, os.cpu_count() or 1)
        found = list(check_all(checks, "cuda" if gpu else "cpu", workers, seconds=seconds))
        results["checks"] = found
        failed = sum(bool(one["failures"]) for one in found)
        print(f"{len(found) - failed} of {len(found)} checks passed", flush=True)
    if not gpu:
        print("torch sees no CUDA device: the Triton kernels were not checked, nothing is timed")
        lengths, documents = (), 0
    for n in lengths:
        case = random_case([n], heads, groups, dim, value_dim=value_dim)
        if profile:
            launch_stages(case)
            continue
        result = time_case(case, rounds=rounds, dense=dense)
        results["times"].append(result)
        print_times(result)
    if documents:
        draw = torch.Generator().manual_seed(0)
        pack = torch.randint(100, 2001, (documents,), generator=draw).tolist()
        both = [
            time_case(
                random_case(n, heads, groups, dim, value_dim=value_dim),
                rounds=rounds,
                dense=(),
                by_stage=False,
            )
            for n in (pack, [sum(pack)])
        ]
        for result in both:
            print_times(result)
        cost = [
            sum(x["whole"]["nsa"][f"{way}_ms"] for way in ("forward", "backward")) for x in both
        ]
        print(f"the pack costs {cost[0] / cost[1]:.2f} of one sequence as long")
        results["packed"] = both
    if json is not None:
        Path(json).write_text(json_module.dumps(results, indent=1))
    return int(failed > 0)


def print_times(result: dict[str, Any]) -> None:
    """Print one case of `time_case` as a table."""
    shape = "T={tokens} B={documents} H={heads} G={groups} D={dim}".format(**result)
    ours = result["whole"]["nsa"]
    total = ours["forward_ms"] + ours["backward_ms"]
    print(f"\n{shape}  {'ms fwd':>9} {'ms bwd':>9} {'ratio':>7} {'peak GiB':>9}")
    for name, row in result["whole"].items():
        ratio = (row["forward_ms"] + row["backward_ms"]) / total
        print(
            f"{name:>32} {row['forward_ms']:9.2f} {row['backward_ms']:9.2f} {ratio:7.2f}"
            f" {row['peak_gib']:9.2f}"
        )
    for name, row in result["stages"].items():
        print(
            f"{name:>32} {row['ms']:9.3f} {row['tflops']:6.0f} TFLOP/s {row['tbytes']:6.2f} TB/s"
            f" {100 * row['of_floor']:4.0f}% of the floor",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tiny-onn bench attention`."""
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 65536])
    parser.add_argument("--heads", type=int, default=64, help="query heads")
    parser.add_argument("--groups", type=int, default=4, help="KV groups")
    parser.add_argument("--dim", type=int, default=128, help="head dimension")
    parser.add_argument("--value-dim", type=int, default=None, help="head dimension of the values")
    parser.add_argument(
        "--check", action="store_true", help="compare every implementation with fp64 first"
    )
    parser.add_argument("--workers", type=int, default=8, help="checks at a time")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time limit of a check")
    parser.add_argument(
        "--dense", nargs="*", choices=("cudnn", "flash"), default=["cudnn", "flash"],
        help="dense attention to compare with",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, default=None, help="write everything to this file")
    parser.add_argument("--rounds", type=int, default=5, help="timed launches of each")
    parser.add_argument("--profile", action="store_true", help="launch all stages once, for ncu")
    parser.add_argument(
        "--documents", type=int, default=0, help="also time a pack of so many documents"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run `bench_attention`."""
    parser = argparse.ArgumentParser(
        prog="tiny-onn bench attention",
        description="example: tiny-onn bench attention --lengths 8192 65536 --json out.json",
    )
    add_arguments(parser)
    return bench_attention(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
