"""Gather, add up and step slices of rows where an owner keeps them, in torch: the plain way.

A slice is w adjacent columns of a row (one layer's, say); a field of a table shows it as a strided
view [S, w]. `kernels.rows_host` does the same to host memory in one pass, compiled.

`adam` on a row touched in every step is torch.optim.Adam. On the others it is lazy: moments do not
decay in steps that do not touch the row, and bias correction goes by the steps that touched it, so
that the first step of a rare token has the size of the first step of a common one. The row-wise
kinds keep one second moment, of the mean squared gradient, for a whole slice: arXiv 1807.01774 does
it for Adagrad.

Shapes: S rows of a field, N distinct rows at hand, w columns of a slice, P rows of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KINDS = ("adam", "adam_rowwise", "adagrad_rowwise")
CHUNK_BYTES = 2**20
"""Memory of a chunk of one field, so that it and the temporaries stay in a CPU's cache."""


@dataclass(frozen=True)
class Rule:
    """How rows are stepped.

    Attributes:
        kind: one of KINDS.
        betas: decay of the first and second moment of both Adams.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        lr: learning rate of this step.
        clip: factor on the gradients.
    """

    kind: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    lr: float
    clip: float


class Clock(NamedTuple):
    """What bias correction makes of the steps of N rows, fp32 [N] each; empty without Adam."""

    step_size_N: Tensor
    root_correction_N: Tensor


class Fields(NamedTuple):
    """Strided fp32 views of one slice of all rows.

    Attributes:
        weight_Sw: the weights.
        first_Sw: first moment; the weights themselves (unused) for adagrad_rowwise.
        second: second moment or sum of squares, [S, w] for adam, else [S, 1].
    """

    weight_Sw: Tensor
    first_Sw: Tensor
    second: Tensor


class Transport(NamedTuple):
    """Where fresh weights go on the way to those who need them next.

    Attributes:
        rows_Pw: contiguous rows, fp32 or bf16.
        places_N: row of each stepped row there, int64; -1 where it is not needed.
    """

    rows_Pw: Tensor
    places_N: Tensor


class RowKernels(Protocol):
    """Both implementations: `TorchRows` here and `kernels.rows_host.CompiledRows`."""

    name: str

    def gather(
        self, source_Sw: Tensor, slots_N: Tensor, out_Pw: Tensor, places_N: Tensor | None = None
    ) -> None:
        """Write rows `slots_N` of a field to `out_Pw` (fp32 or bf16), at `places_N` or in order."""

    def add(
        self,
        total_Pw: Tensor,
        places_N: Tensor,
        fresh_N: Tensor,
        grad_Nw: Tensor,
        squares_P: Tensor,
    ) -> None:
        """Add gradients (fp32 or bf16) to distinct rows of a contiguous fp32 total.

        Rows with `fresh_N` (bool) are set instead; `squares_P` gets the sums of squares of the
        rows at hand, fp32.
        """

    def step(
        self,
        rule: Rule,
        slots_N: Tensor,
        fields: Fields,
        clock: Clock,
        grad_Pw: Tensor,
        grad_places_N: Tensor | None,
        out: Transport | None,
    ) -> None:
        """Step distinct rows in place with rows `grad_places_N` (or in order) of a gradient."""

    def checksum(self, words_SR: Tensor, places_N: Tensor, factors_R: Tensor) -> Tensor:
        """Return the sums int64 [N] of records' words times factors modulo 2**64.

        `words_SR` is contiguous int64; a record's last word does not count.
        """


def tick(rule: Rule, steps_S1: Tensor, slots_N: Tensor) -> Clock:
    """Count a step of distinct rows and return their bias corrections; in fp64, as torch's Adam."""
    steps_N1 = steps_S1.index_select(0, slots_N).add_(1.0)
    steps_S1.index_copy_(0, slots_N, steps_N1)
    steps_N = steps_N1[:, 0].double()
    beta1, beta2 = rule.betas
    return Clock((-rule.lr / (1.0 - beta1**steps_N)).float(), (1.0 - beta2**steps_N).sqrt().float())


class TorchRows:
    """The kernels as vectorised torch operations, for any device."""

    name = "torch"

    def gather(
        self, source_Sw: Tensor, slots_N: Tensor, out_Pw: Tensor, places_N: Tensor | None = None
    ) -> None:
        """See `RowKernels.gather`."""
        for part in _parts(source_Sw, slots_N.shape[0]):
            rows = source_Sw.index_select(0, slots_N[part]).to(out_Pw.dtype)
            if places_N is None:
                out_Pw[part] = rows
            else:
                out_Pw.index_copy_(0, places_N[part], rows)

    def add(
        self,
        total_Pw: Tensor,
        places_N: Tensor,
        fresh_N: Tensor,
        grad_Nw: Tensor,
        squares_P: Tensor,
    ) -> None:
        """See `RowKernels.add`."""
        for part in _parts(total_Pw, places_N.shape[0]):
            places = places_N[part]
            before = total_Pw.index_select(0, places)
            before.masked_fill_(fresh_N[part, None], 0.0)
            after = before.add_(grad_Nw[part])
            total_Pw.index_copy_(0, places, after)
            squares_P.index_copy_(0, places, after.square().sum(1))

    def step(
        self,
        rule: Rule,
        slots_N: Tensor,
        fields: Fields,
        clock: Clock,
        grad_Pw: Tensor,
        grad_places_N: Tensor | None,
        out: Transport | None,
    ) -> None:
        """See `RowKernels.step`."""
        for part in _parts(fields.weight_Sw, slots_N.shape[0]):
            slots = slots_N[part]
            grad = grad_Pw[part] if grad_places_N is None else grad_Pw[grad_places_N[part]]
            grad = grad.float()
            if rule.clip != 1.0:
                grad = grad * rule.clip
            copies = Fields(*(field.index_select(0, slots) for field in fields))
            _update(rule, copies, Clock(*(c[part, None] for c in clock)), grad)
            fields.weight_Sw.index_copy_(0, slots, copies.weight_Sw)
            fields.second.index_copy_(0, slots, copies.second)
            if rule.kind != "adagrad_rowwise":
                fields.first_Sw.index_copy_(0, slots, copies.first_Sw)
            if out is not None:
                kept = (out.places_N[part] >= 0).nonzero()[:, 0]
                rows = copies.weight_Sw.index_select(0, kept).to(out.rows_Pw.dtype)
                out.rows_Pw.index_copy_(0, out.places_N[part].index_select(0, kept), rows)

    def checksum(self, words_SR: Tensor, places_N: Tensor, factors_R: Tensor) -> Tensor:
        """See `RowKernels.checksum`."""
        sums_N = torch.empty_like(places_N)
        count = max(1, CHUNK_BYTES // (8 * words_SR.shape[1]))
        for at in range(0, places_N.shape[0], count):
            part = slice(at, at + count)
            sums_N[part] = (words_SR[places_N[part], :-1] * factors_R[:-1]).sum(dim=1)
        return sums_N


def _update(rule: Rule, fields: Fields, clock: Clock, grad_Nw: Tensor) -> None:
    weight_Nw, first_Nw, second = fields
    if rule.weight_decay:
        weight_Nw.mul_(1.0 - rule.lr * rule.weight_decay)
    if rule.kind == "adagrad_rowwise":
        second.add_(grad_Nw.square().mean(dim=1, keepdim=True))
        weight_Nw.add_((grad_Nw * -rule.lr).div_(second.sqrt().add_(rule.eps)))
        return
    beta1, beta2 = rule.betas
    first_Nw.lerp_(grad_Nw, 1.0 - beta1)
    if rule.kind == "adam":
        second.mul_(beta2).addcmul_(grad_Nw, grad_Nw, value=1.0 - beta2)
    else:
        square_N1 = grad_Nw.square().mean(dim=1, keepdim=True)
        second.mul_(beta2).add_(square_N1, alpha=1.0 - beta2)
    denominator = second.sqrt().div_(clock.root_correction_N).add_(rule.eps)
    weight_Nw.add_((first_Nw * clock.step_size_N).div_(denominator))


def _parts(field_Sw: Tensor, rows: int) -> Iterator[slice]:
    """Yield slices of the rows at hand: in cache-sized chunks on a CPU, all at once on a GPU."""
    count = (
        max(1, CHUNK_BYTES // (4 * field_Sw.shape[1])) if field_Sw.device.type == "cpu" else rows
    )
    for at in range(0, rows, max(1, count)):
        yield slice(at, at + count)
