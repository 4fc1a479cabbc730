"""Whole weights on every rank, and gradients reduced a layer at a time: ZeRO-3 without its hooks.

DeepSpeed's ZeRO-3 gathers a module's weights before it runs and gives them back afterwards, in
hooks around every forward and backward, and takes each parameter's gradient in a hook of its own.
That is Python between the kernels of every layer. Where all weights fit beside the rest
(`zero.resident_gib`), they stay: masters, moments and summed gradients remain partitioned by
DeepSpeed's optimizer, and two things are done here instead of in its hooks:

- after a step, every rank gathers all weights once;
- in the backward pass, the gradients of a layer are reduced together as soon as the last of them is
  there, beside the backward of the layers before it, and summed in fp32 at their owners.

The sums are those of ZeRO-3: gradients are divided by the world size, reduced in `reduce_dtype` and
added to the fp32 partitions micro-batch by micro-batch.

Shapes: W ranks, P elements of a rank's partition of one parameter, n elements of a layer's
partitions together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.zero_setup import EngineError

ALIGNMENT = 64
"""Bytes on which a weight starts: matrix products and the copy engine need 16."""

GATHER_NUMEL = 64 << 20
"""Elements of a rank's partition that are gathered at a time after a step."""

RING = 2
"""Layers whose gradients may be on their way while the backward pass goes on."""


@dataclass
class _Unit:
    """Parameters whose gradients are reduced together.

    Attributes:
        parameters: in the order of their places in the flat buffers.
        sums: where this rank's part of each summed gradient lies, fp32, without padding.
        waiting: parameters without a gradient in this backward pass so far.
    """

    parameters: list[nn.Parameter]
    sums: list[Tensor]
    waiting: int = 0


@dataclass
class _Slot:
    """Buffers in which gradients of a unit travel.

    Attributes:
        whole_Wn: every rank's part, in the reduction's type.
        own_n: this rank's part, reduced.
        pieces: pieces of `whole_Wn`, and (first, last) of the flattened gradient that they take;
            None takes all of it as [W, P].
        owners: which of the unit's parameters each piece belongs to.
        results: for each parameter, its part of `own_n` without padding.
        work: the reduction on its way.
        unit: what it carries; None when it is free.
        add: its results are added to the sums, else they replace them.
    """

    whole_Wn: Tensor
    own_n: Tensor
    pieces: list[tuple[Tensor, tuple[int, int] | None]]
    owners: list[int]
    results: list[Tensor]
    work: Any = None
    unit: _Unit | None = None
    add: bool = False


class ResidentWeights:
    """Keeps the weights of one engine whole and reduces their gradients."""

    def __init__(self, engine: Any, mesh: Mesh, reduce_dtype: torch.dtype) -> None:
        """Take DeepSpeed's hooks off and gather every weight; on all ranks together.

        Args:
            engine: DeepSpeedEngine under ZeRO-3, nothing of it offloaded.
            mesh: the ranks.
            reduce_dtype: type in which gradients are summed over ranks.
        """
        self.module: nn.Module = engine.module
        module, zero = self.module, engine.optimizer
        self.zero, self.mesh = zero, mesh
        self.reduce_dtype = reduce_dtype
        self.names = {id(p): name for name, p in module.named_parameters()}
        self._take_hooks_off(engine)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._place_weights()
        self.units = self._make_units()
        # By the sizes of their units' parameters.
        self._slots: dict[tuple[int, ...], list[_Slot]] = {}
        self._in_flight: list[_Slot] = []
        self._add = False
        zero._partition_all_parameters = lambda: None
        zero.overlapping_partition_gradients_reduce_epilogue = self.finish
        zero._prepare_fp32_grad_for_sub_group = self._give_gradients
        self._gradients: list[Tensor] = list(
            torch.split(
                zero.grad_partitions_flat_buffer,
                [flat.numel() for flat in zero.fp32_partitioned_groups_flat],
            )
        )
        self.gather()

    def _take_hooks_off(self, engine: Any) -> None:
        zero = self.zero
        zero.parameter_offload._remove_module_hooks()
        # The engine's two look for weights that are used outside of their modules.
        around = engine.module_forward_pre_hook, engine.module_forward_post_hook
        for hook in (*zero._grad_acc_hooks, *zero._leaf_module_hooks, *around):
            hook.remove()
        # DeepSpeed's dictionaries look at each parameter's state at every access.
        for module in self.module.modules():
            original: Any = module._original_parameters
            module._parameters = original
        # Ours to gather, after the step.
        zero.persistent_parameters = []

    def _place_weights(self) -> None:
        """Give each parameter memory for all of it: its partition itself where that is all."""
        world = self.mesh.world
        status = type(next(self.module.parameters()).ds_status)  # type: ignore[attr-defined]
        self._chunks: list[tuple[Tensor, list[Tensor]]] = []
        for flat, parameters in zip(
            self.zero.fp16_partitioned_groups_flat, self.zero.fp16_groups, strict=True
        ):
            sizes = [p.partition_numel() for p in parameters]
            step = ALIGNMENT // flat.element_size()
            places = [-(-size * world // step) * step for size in sizes]
            parts = torch.split(flat, sizes)
            if world == 1:
                wholes = [
                    part if part.data_ptr() % ALIGNMENT == 0 else torch.empty_like(part)
                    for part in parts
                ]
                self._copies += [(w, p) for w, p in zip(wholes, parts, strict=True) if w is not p]
            else:
                wholes = list(torch.split(flat.new_empty(sum(places)), places))
                self._chunks += _chunks(flat, parts, wholes, world)
            for p, whole in zip(parameters, wholes, strict=True):
                p.data = whole[: p.ds_numel].view(p.ds_shape)
                p.ds_status, p.ds_persist = status.AVAILABLE, True

    @torch.no_grad()
    def gather(self) -> None:
        """Bring every weight up to date with the partitions; on all ranks together."""
        if self._copies:
            torch._foreach_copy_([w for w, _ in self._copies], [p for _, p in self._copies])
        for part_n, wholes in self._chunks:
            gathered_Wn = part_n.new_empty(self.mesh.world, part_n.numel())
            dist.all_gather_into_tensor(gathered_Wn.view(-1), part_n)
            sizes = [whole_WP.shape[1] for whole_WP in wholes]
            torch._foreach_copy_(wholes, list(torch.split(gathered_Wn, sizes, dim=1)))

    def _make_units(self) -> list[_Unit]:
        """One unit per module that is `gathered_whole`, the last one of all other parameters."""
        grouped: list[list[nn.Parameter]] = []
        taken: set[int] = set()
        for child in self.module.modules():
            if getattr(child, "gathered_whole", False):
                own = [p for p in child.parameters() if id(p) not in taken]
                taken |= {id(p) for p in own}
                grouped.append(own)
        grouped.append([p for p in self.module.parameters() if id(p) not in taken])
        sums = self._sums()
        units = []
        for parameters in grouped:
            if not parameters:
                continue
            unit = _Unit(parameters, [sums[id(p)] for p in parameters], len(parameters))
            for p in parameters:
                p.register_post_accumulate_grad_hook(self._hook(unit))  # type: ignore[no-untyped-call]
            units.append(unit)
        return units

    def _sums(self) -> dict[int, Tensor]:
        """Give this rank's part of every summed gradient, without padding, by parameter."""
        out, offset = {}, 0
        for p in (p for group in self.zero.fp16_groups for p in group):
            size = p.partition_numel()
            first = min(size * self.mesh.rank, p.ds_numel)
            held = min(size, p.ds_numel - first)
            part = self.zero.grad_partitions_flat_buffer.narrow(0, offset, held)
            # Whole and in the gradient's shape on one rank: nothing is then flattened.
            out[id(p)] = part.view(p.ds_shape) if self.mesh.world == 1 else part
            offset += size
        return out

    def _hook(self, unit: _Unit) -> Any:
        def gradient_is_there(_: Tensor) -> None:
            unit.waiting -= 1
            if unit.waiting == 0:
                self._reduce(unit)

        return gradient_is_there

    @torch.no_grad()
    def _reduce(self, unit: _Unit) -> None:
        """Send the unit's gradients off, or on one rank add them up."""
        gradients = [p.grad for p in unit.parameters]
        if self.mesh.world == 1:
            _add(unit.sums, gradients, self._add)  # type: ignore[arg-type]
        else:
            slot = self._slot(unit)
            slot.unit, slot.add = unit, self._add
            sources = []
            for at, (_, span) in zip(slot.owners, slot.pieces, strict=True):
                gradient: Any = gradients[at]
                if span is None:
                    sources.append(gradient.view(self.mesh.world, -1))
                else:
                    sources.append(gradient.view(-1)[span[0] : span[1]])
            torch._foreach_copy_([piece for piece, _ in slot.pieces], sources)
            slot.whole_Wn.div_(self.mesh.world)
            slot.work = dist.reduce_scatter_tensor(
                slot.own_n, slot.whole_Wn.view(-1), async_op=True
            )
            self._in_flight.append(slot)
        for p in unit.parameters:
            p.grad = None

    def _slot(self, unit: _Unit) -> _Slot:
        """Buffers for the unit that no reduction needs any more."""
        slots = self._slots.setdefault(tuple(p.numel() for p in unit.parameters), [])
        for slot in slots:
            if slot.unit is None:
                return slot
        if len(slots) < RING:
            slots.append(self._new_slot(unit))
            return slots[-1]
        # In the order in which they were sent, so that sums never depend on what was free when.
        while all(slot.unit is not None for slot in slots):
            self._settle(self._in_flight.pop(0))
        return next(slot for slot in slots if slot.unit is None)

    def _new_slot(self, unit: _Unit) -> _Slot:
        world, rank = self.mesh.world, self.mesh.rank
        sizes = [math.ceil(p.numel() / world) for p in unit.parameters]
        # Zero, because padding between the parts is reduced with them.
        whole_Wn = torch.zeros(world, sum(sizes), dtype=self.reduce_dtype, device=self.mesh.device)
        own_n = whole_Wn.new_empty(sum(sizes))
        slot = _Slot(whole_Wn, own_n, [], [], [])
        start = 0
        for at, (p, size) in enumerate(zip(unit.parameters, sizes, strict=True)):
            if size * world == p.numel():
                slot.pieces.append((whole_Wn[:, start : start + size], None))
                slot.owners.append(at)
            else:
                for r in range(world):
                    first, last = min(r * size, p.numel()), min((r + 1) * size, p.numel())
                    if first < last:
                        piece = whole_Wn[r, start : start + last - first]
                        slot.pieces.append((piece, (first, last)))
                        slot.owners.append(at)
            held = max(min(size, p.numel() - rank * size), 0)
            slot.results.append(own_n[start : start + held])
            start += size
        return slot

    def _settle(self, slot: _Slot) -> None:
        """Add what a reduction brought to this rank's sums."""
        assert slot.unit is not None
        slot.work.wait()
        _add(slot.unit.sums, slot.results, slot.add)
        slot.work = slot.unit = None

    @torch.no_grad()
    def finish(self) -> None:
        """End a micro-batch's backward pass: every gradient is in the sums afterwards.

        Raises:
            EngineError: a parameter got no gradient.
        """
        idle = [
            self.names[id(p)]
            for unit in self.units
            if unit.waiting > 0
            for p in unit.parameters
            if p.grad is None
        ]
        if idle:
            raise EngineError(no_gradient(self.mesh.rank, sorted(idle)))
        while self._in_flight:
            self._settle(self._in_flight.pop(0))
        for unit in self.units:
            unit.waiting = len(unit.parameters)
        self._add = True

    def begin_step(self) -> None:
        """Let the next gradients replace the sums instead of adding to them."""
        self._add = False

    def norms(self) -> list[Tensor]:
        """Global gradient norms of DeepSpeed's sub-groups, fp64 0-dim; a collective.

        -1 stands for what is not finite, as in DeepSpeed.
        """
        squares = torch.stack(
            [flat.norm(2, dtype=torch.float64).square() for flat in self._gradients]
        )
        if self.mesh.world > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt()
        return list(torch.where(norms.isfinite(), norms, -1.0).unbind())

    def _give_gradients(self, sub_group: int) -> None:
        """Hand the optimizer the sums themselves, where DeepSpeed makes a copy of them."""
        flat = self.zero.fp32_partitioned_groups_flat[sub_group]
        flat.grad = self._gradients[sub_group].to(flat.dtype)


def no_gradient(rank: int, names: Sequence[str]) -> str:
    """Say that parameters got no gradient, and what to do."""
    return (
        f"rank {rank}: no gradient for {', '.join(names)}: under ZeRO-3 every parameter needs one "
        "on every rank in every step; make the loss depend on it (a zero contribution will do)"
    )


def _add(sums: list[Tensor], parts: list[Tensor], add: bool) -> None:
    if add:
        torch._foreach_add_(sums, parts)
    else:
        torch._foreach_copy_(sums, parts)


def _chunks(
    flat: Tensor, parts: Sequence[Tensor], wholes: Sequence[Tensor], world: int
) -> list[tuple[Tensor, list[Tensor]]]:
    """Cut a flat partition into stretches of about GATHER_NUMEL elements.

    Returns:
        For each stretch, its elements [n], and where they go to: [W, P] of each parameter.
    """
    out: list[tuple[Tensor, list[Tensor]]] = []
    start = stop = 0
    targets: list[Tensor] = []
    for i, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
        stop += part.numel()
        targets.append(whole[: part.numel() * world].view(world, -1))
        if stop - start >= GATHER_NUMEL or i == len(parts) - 1:
            out.append((flat[start:stop], targets))
            start, targets = stop, []
    return out
