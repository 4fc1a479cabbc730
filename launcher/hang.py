"""One report of a hang: who is late, in which collective the others wait, and everyone's stacks.

Every rank's watchdog leaves `logs/TRY-rankR.hang.json`, every launcher what it saw of its ranks
from outside in `logs/TRY-nodeN.hang.json`; the launcher that ends makes `logs/TRY-hang.txt` of all.
Collectives come from PyTorch's flight recorder, which counts them by process group on gloo and
NCCL: a rank that has begun fewer than its peers is the one that they wait for.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.lifecycle import write_atomically

LAST = 12
"""Collectives of a rank that the report keeps."""

STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a device",
    "Z": "ended",
    "S": "asleep",
    "R": "running",
}


@dataclass
class Word:
    """What is known of one rank.

    Attributes:
        rank: which.
        node: host it runs on.
        state: of its process as the launcher saw it, a letter of /proc; "" when not seen.
        step: optimizer steps done.
        doing: what ended last.
        silent: seconds since then.
        stacks: of all its threads, the main thread's last.
        collectives: its last ones, oldest first: group, number, operation, sizes, state.
    """

    rank: int
    node: str
    state: str = ""
    step: int = -1
    doing: str = ""
    silent: float = 0.0
    stacks: str = ""
    collectives: list[dict[str, Any]] = field(default_factory=list)


def last_collectives() -> list[dict[str, Any]]:
    """Return this process's last collectives as the flight recorder has them, oldest first.

    Empty before the process group exists. Safe from another thread than the one that hangs.
    """
    from torch._C import _distributed_c10d as c10d

    entries: list[dict[str, Any]] = []
    # One recorder for gloo, one for NCCL; a build without NCCL lacks the second.
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            recorded = json.loads(dump(includeCollectives=True, onlyActive=False))
            entries += recorded.get("entries", [])
    kept: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry.get("is_p2p"):
            continue
        group = " ".join(str(word) for word in entry["process_group"] if word)
        group = f"{group} ({entry['profiling_name'].partition(':')[0]})"
        kept[group].append(
            {
                "group": group,
                "number": int(entry["collective_seq_id"]),
                "operation": entry["profiling_name"],
                "sizes": entry.get("input_sizes"),
                "state": entry.get("state", ""),
                "created": int(entry.get("time_created_ns") or 0),
            }
        )
    last = [e for group in kept.values() for e in group[-LAST:]]
    return sorted(last, key=lambda e: e["created"])


def rank_path(logs: Path, attempt: str, rank: int) -> Path:
    """Return where a rank's watchdog leaves its part."""
    return logs / f"{attempt}-rank{rank}.hang.json"


def node_path(logs: Path, attempt: str, node: int) -> Path:
    """Return where a node's launcher leaves what it saw."""
    return logs / f"{attempt}-node{node}.hang.json"


def write_words(path: Path, words: Sequence[Word]) -> None:
    """Leave a part of the report."""
    write_atomically(path, json.dumps([word.__dict__ for word in words]))


def gather(logs: Path, attempt: str, world: int) -> list[Word]:
    """Put together what is known of every rank of a try; a rank without a word has no node."""
    words = {rank: Word(rank, "") for rank in range(world)}
    for path in sorted(logs.glob(f"{attempt}-node*.hang.json")):
        for fields in json.loads(path.read_text()):
            words[fields["rank"]] = Word(**fields)
    for path in sorted(logs.glob(f"{attempt}-rank*.hang.json")):
        (fields,) = json.loads(path.read_text())
        seen = words[fields["rank"]]
        # A rank that was stopped speaks after it was continued: its stacks are of later.
        stacks = seen.stacks or fields["stacks"]
        # One that has said that it hangs ends by itself.
        state = "" if seen.state == "Z" else seen.state
        words[fields["rank"]] = Word(**{**fields, "state": state, "stacks": stacks})
    return [words[rank] for rank in range(world)]


@dataclass(frozen=True)
class Verdict:
    """Who is late and why, in words; `waits` is what the others do meanwhile."""

    late: tuple[int, ...]
    reason: str
    waits: str


def judge(words: Sequence[Word]) -> Verdict:
    """Tell which ranks the others wait for."""
    lacking = _lacking(words)
    waits = "; ".join(dict.fromkeys(lacking.values())) or _common_place(words)
    silent = [w.rank for w in words if not w.node]
    if silent and len(silent) < len(words):
        return Verdict(tuple(silent), "left no word: the node or its launcher is gone", waits)
    stopped = [w for w in words if w.state in ("T", "t", "Z", "D")]
    if stopped:
        reason = f"process is {STATES[stopped[0].state]}"
        return Verdict(tuple(w.rank for w in stopped), reason, waits)
    if lacking:
        late = tuple(sorted(lacking))
        return Verdict(late, f"has not begun {lacking[late[0]]}", waits)
    steps = [w.step for w in words]
    if len(set(steps)) > 1:
        late = tuple(w.rank for w in words if w.step == min(steps))
        return Verdict(late, f"is still in step {min(steps) + 1}", waits)
    return Verdict((), "no rank is behind: all are in the same place", waits)


def _lacking(words: Sequence[Word]) -> dict[int, str]:
    """Return {late rank: the collective that it has not begun}, by the recorders' counts.

    A rank waits for another when it has begun a collective of a group that the other has not. Late
    is who is waited for and waits for no one.
    """
    begun: dict[str, dict[int, int]] = defaultdict(dict)
    names: dict[tuple[str, int], str] = {}
    for word in words:
        for entry in word.collectives:
            group, number = entry["group"], entry["number"]
            begun[group][word.rank] = max(number, begun[group].get(word.rank, 0))
            names[group, number] = _named(entry)
    waiting: set[int] = set()
    behind: dict[int, str] = {}
    for group, numbers in begun.items():
        most = max(numbers.values())
        for rank, number in numbers.items():
            if number < most:
                missing = names.get((group, number + 1), f"number {number + 1} of {group}")
                behind.setdefault(rank, missing)
            elif min(numbers.values()) < most:
                waiting.add(rank)
    return {r: text for r, text in behind.items() if r not in waiting} or behind


def _common_place(words: Sequence[Word]) -> str:
    last = [w.collectives[-1] for w in words if w.collectives]
    if not last:
        return "no collective was recorded"
    return "; ".join(dict.fromkeys(_named(entry) for entry in last))


def _named(entry: Mapping[str, Any]) -> str:
    sizes = f" of {entry['sizes']}" if entry["sizes"] else ""
    return f"{entry['operation']}{sizes}, number {entry['number']} of {entry['group']}"


def report(logs: Path, attempt: str, world: int) -> tuple[Path, str]:
    """Write the report of a hang; returns its path and what it comes down to, in a line."""
    words = gather(logs, attempt, world)
    verdict = judge(words)
    path = logs / f"{attempt}-hang.txt"
    if verdict.late:
        first, others = words[verdict.late[0]], verdict.late[1:]
        who = f"rank {first.rank}" + (f" (and {', '.join(map(str, others))})" if others else "")
        at = f" on {first.node}" if first.node else ""
        summary = f"{who}{at} is late: {verdict.reason}"
        if len(verdict.late) < world:
            summary += f"; the others wait in {verdict.waits}"
    else:
        summary = f"{verdict.reason}: {verdict.waits}"
    lines = [f"Hang of {attempt}, {time.strftime('%F %T')}", summary, "", _table(words)]
    for stacks, ranks in _by_stacks(words).items():
        lines += ["", f"== stacks of {_ranges(ranks)}", stacks]
    for word in words:
        if word.collectives:
            lines += ["", f"== last collectives of rank {word.rank}, oldest first"]
            lines += [
                f"{e['group']} number {e['number']}: {e['operation']} {e['sizes']} {e['state']}"
                for e in word.collectives
            ]
    write_atomically(path, "\n".join(lines) + "\n")
    return path, summary


def _table(words: Sequence[Word]) -> str:
    rows = ["rank  node              process                         steps  silent s  after"]
    for w in words:
        state = STATES.get(w.state, w.state) or "not seen"
        rows.append(
            f"{w.rank:>4}  {w.node or '?':<16}  {state:<30}  {w.step:>5}  {w.silent:>8.0f}  "
            f"{w.doing}"
        )
    return "\n".join(rows)


def _by_stacks(words: Sequence[Word]) -> Mapping[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for word in words:
        groups[word.stacks.rstrip() or "(none: its process did not answer)"].append(word.rank)
    return groups


def _ranges(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
