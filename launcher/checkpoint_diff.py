"""What two checkpoints differ in: configuration, names and sizes, and by how much every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from launcher.config import flatten
from parallel.checkpoint import Checkpoint
from parallel.checkpoint_read import DenseReader, TableReader
from parallel.zero_state import KINDS


def difference(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield a line per difference; none when both hold the same, whatever ranks saved them.

    One parameter, or one stretch of table rows, of each is in memory at a time.
    """
    for key in ("step", "tokens"):
        if a.meta[key] != b.meta[key]:
            yield f"{key}: {a.meta[key]:,} and {b.meta[key]:,}"
    ours, theirs = (dict(flatten(c.meta.get("config", {}))) for c in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"config {key}: {ours.get(key)!r} and {theirs.get(key)!r}"
    yield from _dense(DenseReader(a), DenseReader(b))
    left, right = ({t.name: t for t in TableReader.all(c)} for c in (a, b))
    yield from _only("table", left, right)
    for name in sorted(left.keys() & right.keys()):
        yield from _rows(left[name], right[name])


def _dense(a: DenseReader, b: DenseReader) -> Iterator[str]:
    left, right = a.shapes, b.shapes
    yield from _only("weight", left, right)
    same = {name for name in left.keys() & right.keys() if left[name] == right[name]}
    for name in sorted((left.keys() & right.keys()) - same):
        yield f"weight {name}: shapes {list(left[name])} and {list(right[name])}"
    for kind in KINDS:
        pairs = zip(
            ((n, t) for n, t in a.parameters(kind) if n in same),
            ((n, t) for n, t in b.parameters(kind) if n in same),
            strict=True,
        )
        for (name, x), (_, y) in pairs:
            yield from _far(f"{'weight' if kind == 'fp32' else kind} {name}", x, y)
    ours, theirs = a.buffers(), b.buffers()
    yield from _only("buffer", ours, theirs)
    for name in sorted(ours.keys() & theirs.keys()):
        yield from _far(f"buffer {name}", ours[name], theirs[name])


def _rows(a: TableReader, b: TableReader) -> Iterator[str]:
    if (a.rows, a.widths) != (b.rows, b.widths):
        yield f"table {a.name}: {a.rows} rows of {a.widths} and {b.rows} rows of {b.widths}"
        return
    far: dict[str, tuple[float, int, int]] = {}
    for (first, x), (_, y) in zip(a.stretches(), b.stretches(), strict=True):
        for name in a.widths:
            differs_N = (x[name] != y[name]).any(dim=1)
            if bool(differs_N.any()):
                most, at, rows = far.get(name, (0.0, 0, 0))
                distance_N = (x[name].double() - y[name].double()).abs().amax(dim=1)
                place = int(distance_N.argmax())
                if float(distance_N[place]) > most:
                    most, at = float(distance_N[place]), first + place
                far[name] = (most, at, rows + int(differs_N.sum()))
    for name, (most, at, rows) in far.items():
        yield (
            f"table {a.name} {name}: {rows:,} of {a.rows:,} rows differ, at most by {most:.6g} "
            f"(row {at})"
        )


def _far(what: str, x: Tensor, y: Tensor) -> Iterator[str]:
    if x.shape != y.shape or x.dtype != y.dtype:
        yield f"{what}: {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
    elif not torch.equal(x, y):
        most = float((x.double() - y.double()).abs().max())
        scale = float(x.double().abs().max())
        yield f"{what}: max abs difference {most:.6g} (largest value {scale:.6g})"


def _only(what: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for one, other in zip_longest(sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())):
        if one is not None:
            yield f"{what} {one}: only in the first"
        if other is not None:
            yield f"{what} {other}: only in the second"
