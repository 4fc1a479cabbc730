"""The figures of `tiny-onn bench tables` as text."""

from __future__ import annotations

from typing import Any

from launcher.bench_turns import verdict

BARS = {"rows-host": (1.015, 1.02), "rows-nvme": (1.05, 1.05)}
"""Goals for the step time with a table: on one GPU, on several."""

LARGER_TABLE = 1.03
"""Goal for the step time with a table of more rows, to that with the first, same ids a batch."""


def report(results: dict[str, Any]) -> str:
    """Return the results as a table."""
    setting = results["setting"]
    lines = [
        f"{setting['device']} x {setting['world']}, {setting['layers']} layers of "
        f"{setting['width']}, V = {setting['vocab']}, {setting['tokens']} tokens, "
        f"{setting['unique_rows']:.0f} unique rows ({setting['unique_bytes'] / 1e6:.0f} MB)",
        f"{'variant':<14} {'ms':>8} {'plain':>8} {'ratio':>7} {'95 %':>15} {'steps':>7} "
        f"{'peak':>7} {'extra':>7} {'/rows':>6}",
    ]
    for name, found in results.items():
        if name == "setting":
            continue
        if "error" in found:
            lines.append(f"{name:<14} failed: {found['error'][:100]}")
            continue
        if "ratio" not in found:
            lines.append(f"{name:<14} {found['ms']:8.1f} {'':>47} {found['peak_gib']:7.2f}")
            continue
        lines.append(
            f"{name:<14} {found['ms']:8.1f} {found['plain_ms']:8.1f} {found['ratio']:7.4f} "
            f"{found['low']:7.4f} {found['high']:7.4f} {found['step_ratio']:7.4f} "
            f"{found['peak_gib']:7.2f} {found.get('extra_gib', 0.0):7.3f} "
            f"{found.get('extra_over_unique', 0.0):6.2f}{_goal(name, found, setting['world'])}"
        )
        lines += [f"{'':<14} {line}" for line in (_parts(found), *_table(found)) if line]
    return "\n".join(lines)


def _goal(name: str, found: dict[str, Any], world: int) -> str:
    if name not in BARS and "/" not in name:
        return ""
    bar = BARS[name][world > 1] if name in BARS else LARGER_TABLE
    return f"  goal {bar}: {verdict(found, bar)}"


def _parts(found: dict[str, Any]) -> str:
    """Where the host's time goes: of a part of the step what the table adds, of its thread all."""
    ours, plain = found["parts"], found["plain_parts"]
    host = [
        f"{part.removeprefix('host ')} {1e3 * (value - plain.get(part, 0.0)):+.1f}"
        for part, value in ours.items()
        if part.startswith("host ")
    ]
    thread = [
        f"{part.removeprefix('thread ')} {1e3 * value:.1f}"
        for part, value in ours.items()
        if part.startswith("thread ")
    ]
    said = f"host ms more: {', '.join(host)}"
    return f"{said}; table's thread: {', '.join(thread)}" if thread else said


def _table(found: dict[str, Any]) -> list[str]:
    if "table_gib" not in found:
        return []
    lines = [
        f"table of {found['table_gib']:.1f} GiB, opened in {found['open_seconds']:.1f} s, "
        f"{found['kernel']} kernels"
    ]
    if "save" in found:
        saved = found["save"]
        lines.append(
            f"{saved['bytes'] / 1e9:.2f} GB saved in {saved['seconds']:.1f} s beside steps of "
            f"{saved['step_ms']:.1f} ms"
        )
    if found["parts"].get("cache_hits"):
        hits, misses = found["parts"]["cache_hits"], found["parts"]["cache_misses"]
        lines.append(f"cache: {hits / (hits + misses):.1%} of the rows found there")
    return lines
