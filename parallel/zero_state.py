"""ZeRO-3's dense state as plain host tensors by parameter name, and back, at any world size.

Every rank holds one flat partition of each parameter: elements [r·P, (r+1)·P) of the flattened
weight, P = ceil(numel / world), without the padding behind the last element. So a parameter of N
saved ranks is their partitions end to end, and any other world size cuts it anew.

DeepSpeed's own checkpoints lose the Adam state of an optimizer on NVMe and cannot change the world
size; this reads and writes the fp32 partitions themselves, swapped in and out as in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.host_buffers import HostBuffers
from parallel.tensor_file import TensorSource, TensorSpec, joined
from parallel.zero_setup import EngineError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("fp32", *MOMENTS)
"""Tensors per parameter: master weight, first and second moment; keys are "fp32/NAME" and so on."""

Shards = Callable[[int], Mapping[str, Tensor]]
"""Tensors that a saved rank's `DenseState.snapshot` gave, by its rank."""


def partition_range(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Return [start, stop) of a rank's elements of a flattened parameter, padding excluded."""
    size = math.ceil(numel / world)
    start = min(rank * size, numel)
    return start, min(start + size, numel)


def cut(key: str, numel: int, start: int, stop: int, shards: Shards, world: int) -> Tensor:
    """Assemble elements [start, stop) of a flattened parameter from the shards that hold them.

    Args:
        key: "fp32/NAME", "exp_avg/NAME" or "exp_avg_sq/NAME".
        numel: elements of the whole parameter.
        start: first element.
        stop: behind the last one.
        shards: tensors of each saved rank.
        world: ranks that saved.
    """
    pieces = []
    for rank in range(world):
        first, last = partition_range(numel, rank, world)
        low, high = max(first, start), min(last, stop)
        if low < high:
            piece = shards(rank)[key]
            if piece.numel() != last - first:
                raise EngineError(
                    f"tensor '{key}' of saved rank {rank} has {piece.numel()} elements instead of "
                    f"{last - first}: the checkpoint is not from {world} ranks of this model"
                )
            pieces.append(piece[low - first : high - first])
    return torch.cat(pieces) if pieces else torch.empty(0)


def full_tensors(
    meta: Mapping[str, Any], shards: Shards, kind: str = "fp32"
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole fp32 tensor) of every parameter, one at a time, without any process group.

    Args:
        meta: any saved rank's meta from `DenseState.snapshot`.
        shards: tensors of each saved rank.
        kind: one of KINDS.
    """
    for name, entry in meta["parameters"].items():
        numel = math.prod(entry["shape"])
        flat = cut(f"{kind}/{name}", numel, 0, numel, shards, meta["world"])
        yield name, flat.view(entry["shape"])


def buffers_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a saved rank's module buffers by name (replicated: any rank's will do)."""
    return {name: tensors[f"buffer/{name}"] for name in meta["buffers"]}


@dataclass(frozen=True)
class _Piece:
    """Where a parameter's partition lies in its sub-group's flat fp32 tensor."""

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.stop - self.start)

    def of_or_zero(self, flat: Tensor | None) -> Tensor:
        """Return the piece, zero where the optimizer has not made a moment yet."""
        return torch.zeros(self.stop - self.start) if flat is None else self.of(flat)


class DenseState:
    """The partitions of one rank inside DeepSpeed's ZeRO-3 optimizer, for every offload mode."""

    def __init__(
        self,
        module: nn.Module,
        zero: Any,
        rank: int,
        world: int,
        gather: Callable[[], None] | None = None,
    ) -> None:
        """Describe the partitions.

        Args:
            module: the partitioned model.
            zero: DeepSpeedZeroOptimizer_Stage3.
            rank: this rank.
            world: ranks that partition.
            gather: brings weights that stay whole up to date; a collective. None gathers those
                that DeepSpeed keeps.
        """
        self.module, self.zero, self.rank, self.world = module, zero, rank, world
        self._gather = gather or self._gather_persistent
        names = {id(p): name for name, p in module.named_parameters()}
        self.groups: list[list[_Piece]] = []
        for parameters in zero.fp16_groups:
            pieces, offset = [], 0
            for p in parameters:
                start, stop = partition_range(p.ds_numel, rank, world)
                pieces.append(_Piece(names[id(p)], tuple(p.ds_shape), offset, start, stop))
                offset += p.partition_numel()
            self.groups.append(pieces)

    def snapshot(self, buffers: HostBuffers | None) -> tuple[TensorSource, dict[str, Any]]:
        """Return this rank's partitions and the buffers as of now.

        Args:
            buffers: take copies of everything; with None the source gives the live state, which
                must be read before the next step (and is swapped in piece by piece).

        Returns:
            Tensors by key (fp32, flat; buffers as they are), and a JSON-able meta: world, rank,
            {parameter: shape, steps} and the buffers' names.
        """
        specs, parameters = {}, {}
        for index, pieces in enumerate(self.groups):
            steps = self._steps(index)
            for piece in pieces:
                for kind in KINDS:
                    size = piece.stop - piece.start
                    specs[f"{kind}/{piece.name}"] = TensorSpec(torch.float32, (size,))
                parameters[piece.name] = {"shape": list(piece.shape), "steps": steps}
        persistent = {f"buffer/{n}": b for n, b in _persistent_buffers(self.module)}
        meta = {
            "world": self.world,
            "rank": self.rank,
            "parameters": dict(sorted(parameters.items())),
            "buffers": sorted(name.removeprefix("buffer/") for name in persistent),
        }
        if buffers is None:
            live = TensorSource(specs, self._live, in_memory=False)
            return joined([TensorSource.of(persistent), live]), meta
        copies = {name: buffers.copy(name, buffer) for name, buffer in persistent.items()}
        flats: list[dict[str, Tensor | None]] = []
        for index in range(len(self.groups)):
            with self._resident(index, write=False) as flat:
                state = self.zero.optimizer.state.get(flat, {})
                sources = {"fp32": flat.data, **{m: state.get(m) for m in MOMENTS}}
                flats.append(
                    {
                        kind: None if t is None else buffers.copy(f"{kind}/{index}", t)
                        for kind, t in sources.items()
                    }
                )
                # Swapped-in memory is another sub-group's next.
                buffers.wait()
        copied = TensorSource(
            specs,
            lambda: (
                piece.of_or_zero(flat[kind])
                for flat, pieces in zip(flats, self.groups, strict=True)
                for piece in pieces
                for kind in KINDS
            ),
        )
        return joined([TensorSource.of(copies), copied]), meta

    def _live(self) -> Iterator[Tensor]:
        for index, pieces in enumerate(self.groups):
            with self._resident(index, write=False) as flat:
                state = self.zero.optimizer.state.get(flat, {})
                sources = {"fp32": flat.data, **{m: state.get(m) for m in MOMENTS}}
                for piece in pieces:
                    yield from (piece.of_or_zero(sources[kind]) for kind in KINDS)

    @property
    def nbytes(self) -> int:
        """Bytes of a snapshot's partitions."""
        return sum(
            len(KINDS) * 4 * (piece.stop - piece.start)
            for pieces in self.groups
            for piece in pieces
        )

    def _steps(self, index: int) -> int:
        """Return the optimizer steps of a sub-group, without swapping anything in."""
        state = self.zero.optimizer.state.get(self.zero.fp32_partitioned_groups_flat[index], {})
        return int(state.get("step", 0))

    def restore(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shards: Shards | None
    ) -> None:
        """Put saved partitions and buffers in place; on all ranks together.

        Weights in the compute type are rounded from the fp32 masters as in a step, so that the
        next forward pass equals the saved run's.

        Args:
            tensors: what this rank saved; at another world size, any saved rank's (for buffers).
            meta: the meta that belongs to `tensors`.
            shards: tensors of every saved rank; needed at another world size only.

        Raises:
            EngineError: another model's state, or another world size without `shards`.
        """
        self._check(meta)
        if meta["world"] == self.world and meta["rank"] == self.rank:
            shards = {self.rank: tensors}.__getitem__
        elif shards is None:
            raise EngineError(
                f"this state was saved by rank {meta['rank']} of {meta['world']} and is loaded by "
                f"rank {self.rank} of {self.world}: pass the shards of all saved ranks"
            )
        self.zero._partition_all_parameters()
        for index, pieces in enumerate(self.groups):
            steps = {meta["parameters"][piece.name]["steps"] for piece in pieces}
            if len(steps) != 1:
                raise EngineError(f"parameters stepped together have different steps: {steps}")
            with self._resident(index, write=True) as flat:
                moments = self._moments(flat, steps.pop())
                for kind, target in {"fp32": flat.data, **moments}.items():
                    # Padding carries no weight, but must not depend on what memory held.
                    target.zero_()
                    for piece in pieces:
                        key = f"{kind}/{piece.name}"
                        source = cut(
                            key, piece.numel, piece.start, piece.stop, shards, meta["world"]
                        )
                        piece.of(target).copy_(source)
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self._gather()
        saved = buffers_of(tensors, meta)
        with torch.no_grad():
            for name, buffer in _persistent_buffers(self.module):
                buffer.copy_(saved[name])

    def rewrite(self, changes: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        """Put new values into parts of parameters and clear their moments; on all ranks together.

        Args:
            changes: parameter name to pieces: first element of the flattened parameter, and new
                fp32 values, the same on every rank.

        Raises:
            EngineError: no such parameter, or elements beyond its end.
        """
        shapes = {piece.name: piece.numel for pieces in self.groups for piece in pieces}
        for name, new in changes.items():
            if any(start + values.numel() > shapes.get(name, 0) for start, values in new):
                raise EngineError(
                    f"cannot rewrite '{name}': the model has {shapes.get(name, 0)} elements of it"
                )
        self.zero._partition_all_parameters()
        for index, pieces in enumerate(self.groups):
            touched = [piece for piece in pieces if piece.name in changes]
            if not touched:
                continue
            with self._resident(index, write=True) as flat:
                state = self.zero.optimizer.state.get(flat, {})
                for piece in touched:
                    for start, values in changes[piece.name]:
                        low = max(start, piece.start)
                        high = min(start + values.numel(), piece.stop)
                        if low >= high:
                            continue
                        part = slice(low - piece.start, high - piece.start)
                        piece.of(flat.data)[part].copy_(values[low - start : high - start])
                        for moment in MOMENTS:
                            if moment in state:
                                piece.of(state[moment])[part].zero_()
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self._gather()

    def _gather_persistent(self) -> None:
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def _resident(self, index: int, *, write: bool) -> Iterator[Tensor]:
        """Give a sub-group's flat fp32 tensor in memory; `write` stores changes when swapped."""
        zero = self.zero
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield zero.fp32_partitioned_groups_flat[index]
            if swapped and write:
                zero._optimizer_states_and_gradient_swap_out(index)
        finally:
            if swapped and not write:
                zero._release_swap_buffers(index)

    def _moments(self, flat: Tensor, steps: int) -> dict[str, Tensor]:
        """Return the moments of a sub-group, made if it was never stepped, with the step set."""
        optimizer = self.zero.optimizer
        state = optimizer.state[flat]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat.data)
        if isinstance(optimizer, torch.optim.AdamW):
            # On the device of the weights, where the fused kernel wants it.
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
            state["step"].fill_(steps)
        else:
            state["step"] = steps
        return {name: state[name] for name in MOMENTS}

    def _check(self, meta: Mapping[str, Any]) -> None:
        own = {p.name: str(list(p.shape)) for pieces in self.groups for p in pieces}
        saved = {name: str(entry["shape"]) for name, entry in meta["parameters"].items()}
        own |= {name: "a buffer" for name, _ in _persistent_buffers(self.module)}
        saved |= {name: "a buffer" for name in meta["buffers"]}
        wrong = [
            f"{name}: saved {saved.get(name, 'not at all')}, model has {own.get(name, 'no such')}"
            for name in sorted(own.keys() | saved.keys())
            if own.get(name) != saved.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise EngineError(
                f"the saved state is another model's: {'; '.join(wrong[:5])}{more}. Resume with "
                "the configuration the run began with"
            )


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
