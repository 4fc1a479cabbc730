"""Whose fault is it? Reads what every node of a pre-flight found and names the unfit ones.

`python -m launcher.preflight_judge LOGS TRY` runs where the job's script runs, on what the nodes
left in `logs/`, and loads nothing but the standard library. A node is unfit when it found a problem
of its own, differs from the majority in a version, did not report, or fails in every all-reduce
that it took part in while others work. What is the same on all nodes is no node's fault.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIT, JOB, NODES = 0, 3, 4
"""Exit codes: all fit; the job's own fault, so that no node is to blame; some nodes are unfit."""


def report_path(logs: Path, attempt: str, node: int) -> Path:
    """Return where a node leaves its report."""
    return logs / f"{attempt}-preflight-node{node}.json"


def judge(logs: Path, attempt: str) -> int:
    """Print what is wrong to stderr and the names of unfit nodes, by commas, to stdout.

    Returns:
        FIT, JOB or NODES.
    """
    names = os.environ.get("TINY_ONN_NODES", "").split()
    reports = [_read(report_path(logs, attempt, node)) for node in range(len(names))]
    faults, general = find_faults(names, reports)
    for name in names:
        for text in faults.get(name, []):
            print(f"pre-flight: node {name}: {text}", file=sys.stderr)
    for text in general:
        print(f"pre-flight: {text}", file=sys.stderr)
    if faults and len(faults) == len(names) > 1:
        print("pre-flight: every node has a fault, so none is excluded", file=sys.stderr)
        return JOB
    if faults:
        print(",".join(faults))
        return NODES
    if general:
        return JOB
    first = reports[0]
    assert first is not None
    speeds = ", ".join(f"{b} {v:g} GB/s" for b, v in first["gigabytes_per_s"].items())
    over = f"; all-reduce of 4 MiB over all nodes: {speeds}" if speeds else ""
    seconds = max(r["seconds"] for r in reports if r)
    print(f"pre-flight: {len(names)} node(s) are fit, {seconds:.0f} s{over}", file=sys.stderr)
    return FIT


def find_faults(
    names: Sequence[str], reports: Sequence[Mapping[str, Any] | None]
) -> tuple[dict[str, list[str]], list[str]]:
    """Tell what is wrong with which node.

    Args:
        names: of the nodes, in order.
        reports: the fields of each node's `Report`; None when there is none.

    Returns:
        ({name: what is wrong with it}, what is wrong and no single node's fault).
    """
    faults: dict[str, list[str]] = {}
    general: list[str] = []

    def blame(node: int, text: str) -> None:
        faults.setdefault(names[node], []).append(text)

    for node, report in enumerate(reports):
        if report is None:
            blame(node, "left no report: it could not start Python, or its log says why")
        elif report["doing"]:
            blame(node, f"did not finish: it was at '{report['doing']}'")
        for text in report["problems"] if report else ():
            blame(node, text)
    present = [(node, r) for node, r in enumerate(reports) if r and r["versions"]]
    for key in sorted({k for _, r in present for k in r["versions"]}):
        values = [r["versions"].get(key, "none") for _, r in present]
        # Of equally many the first node's: a Counter keeps the order of arrival.
        usual = Counter(values).most_common(1)[0][0]
        for (node, _), value in zip(present, values, strict=True):
            if value != usual:
                blame(node, f"{key} is {value or 'none'}, on the others {usual or 'none'}")
    _judge_network(names, reports, blame, general, faults)
    return faults, general


def _judge_network(
    names: Sequence[str],
    reports: Sequence[Mapping[str, Any] | None],
    blame: Any,
    general: list[str],
    faults: Mapping[str, Any],
) -> None:
    present = {node: r for node, r in enumerate(reports) if r and not r["doing"]}
    cut_off = [n for n, r in present.items() if r["network"] and r["peers"].get("0")]
    if cut_off and len(cut_off) >= len(names) - 1 > 1:
        blame(0, f"no other node reaches it: {present[cut_off[0]]['network']}")
        return
    for node in cut_off:
        blame(node, present[node]["network"])
    met = [r for n, r in present.items() if n not in cut_off]
    for node in sorted({int(p) for r in met for p, text in r["peers"].items() if text}):
        if names[node] not in faults:
            blame(node, "did not come to the network check")
    links: dict[tuple[int, int], str] = {}
    for node, r in present.items():
        for peer, text in r["links"].items():
            pair = (min(node, int(peer)), max(node, int(peer)))
            links[pair] = links.get(pair) or text
    bad = {pair: text for pair, text in links.items() if text}
    for node in range(len(names)):
        mine = [pair for pair in links if node in pair]
        if not mine or any(pair not in bad for pair in mine):
            continue
        others = [p for pair in mine for p in pair if p != node]
        elsewhere = any(other in pair and pair not in bad for other in others for pair in links)
        if elsewhere or (len(names) == 2 and node == 1):
            blame(node, f"all-reduce with node {names[others[0]]} failed: {links[mine[0]]}")
    if faults:
        return
    general.extend(
        f"all-reduce between {names[a]} and {names[b]} failed: {text}"
        for (a, b), text in bad.items()
    )
    if not bad:
        failed = {r["network"]: names[n] for n, r in present.items() if r["network"]}
        general.extend(f"all-reduce over all nodes failed on {n}: {t}" for t, n in failed.items())


def main(argv: Sequence[str]) -> int:
    """Judge; see `judge`."""
    logs, attempt = argv
    return judge(Path(logs), attempt)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return report if isinstance(report, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
