"""Gather, add up and step slices of rows where an owner keeps them, in torch: the plain way.

A row is worked on in L slices (its layers) of w adjacent columns, one after another; a counter
tells another thread how many are done. `kernels.rows_host` does the same to host memory in one
pass, compiled.

`adam` on a row touched in every step is torch.optim.Adam. On the others it is lazy: moments do not
decay in steps that do not touch the row, and bias correction goes by the steps that touched it, so
that the first step of a rare token has the size of the first step of a common one. The row-wise
kinds keep one second moment, of the mean squared gradient, for a whole slice: arXiv 1807.01774 does
it for Adagrad.

Shapes: S rows of a field, W columns of a row, N distinct rows at hand, L slices of w = W / L
columns, P rows of what travels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
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
    """Strided fp32 views of all rows.

    Attributes:
        weight_SW: the weights.
        first_SW: first moment; the weights themselves (unused) for adagrad_rowwise.
        second: second moment or sum of squares, [S, W] for adam, else one per slice, [S, L].
    """

    weight_SW: Tensor
    first_SW: Tensor
    second: Tensor

    def slice(self, k: int, parts: int) -> Fields:
        """Return the columns of slice `k` of so many."""
        widths = [field.shape[1] // parts for field in self]
        return Fields(*(f[:, k * w : (k + 1) * w] for f, w in zip(self, widths, strict=True)))


class Transport(NamedTuple):
    """Where fresh weights go on the way to those who need them next.

    Attributes:
        rows_LPw: contiguous slices of rows, fp32 or bf16.
        places_N: row of each stepped row there, int64; -1 where it is not needed.
    """

    rows_LPw: Tensor
    places_N: Tensor


Counter = ctypes.c_int64
"""Slices that are done, for a thread that looks now and then."""


class RowKernels(Protocol):
    """Both implementations: `TorchRows` here and `kernels.rows_host.CompiledRows`."""

    name: str

    def gather(
        self,
        source_SW: Tensor,
        slots_N: Tensor,
        out_LPw: Tensor,
        places_N: Tensor | None = None,
        ready: Counter | None = None,
    ) -> None:
        """Write rows `slots_N` to `out_LPw` (contiguous, fp32 or bf16), at `places_N` or in order.

        `ready` counts the slices that are written.
        """

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
        grads_LPw: Sequence[Tensor],
        out: Transport | None,
        ready: Counter | None = None,
    ) -> None:
        """Step distinct rows in place, one slice after another, with a gradient [N, w] for each.

        `ready` counts the slices that are done, `out` included.
        """

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
        self,
        source_SW: Tensor,
        slots_N: Tensor,
        out_LPw: Tensor,
        places_N: Tensor | None = None,
        ready: Counter | None = None,
    ) -> None:
        """See `RowKernels.gather`."""
        for k, out_Pw in enumerate(out_LPw):
            w = out_Pw.shape[1]
            source_Sw = source_SW[:, k * w : (k + 1) * w]
            for part in _parts(source_Sw, slots_N.shape[0]):
                rows = source_Sw.index_select(0, slots_N[part]).to(out_Pw.dtype)
                if places_N is None:
                    out_Pw[part] = rows
                else:
                    out_Pw.index_copy_(0, places_N[part], rows)
            if ready is not None:
                ready.value = k + 1

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
        grads_LPw: Sequence[Tensor],
        out: Transport | None,
        ready: Counter | None = None,
    ) -> None:
        """See `RowKernels.step`."""
        for k, grad_Pw in enumerate(grads_LPw):
            columns = fields.slice(k, len(grads_LPw))
            fresh = None if out is None else Transport(out.rows_LPw[k : k + 1], out.places_N)
            for part in _parts(columns.weight_SW, slots_N.shape[0]):
                self._step(rule, slots_N, columns, clock, grad_Pw, fresh, part)
            if ready is not None:
                ready.value = k + 1

    def _step(
        self,
        rule: Rule,
        slots_N: Tensor,
        columns: Fields,
        clock: Clock,
        grad_Pw: Tensor,
        out: Transport | None,
        part: slice,
    ) -> None:
        """Step some rows' slice."""
        slots, grad = slots_N[part], grad_Pw[part].float()
        if rule.clip != 1.0:
            grad = grad * rule.clip
        copies = Fields(*(field.index_select(0, slots) for field in columns))
        _update(rule, copies, Clock(*(c[part, None] for c in clock)), grad)
        columns.weight_SW.index_copy_(0, slots, copies.weight_SW)
        columns.second.index_copy_(0, slots, copies.second)
        if rule.kind != "adagrad_rowwise":
            columns.first_SW.index_copy_(0, slots, copies.first_SW)
        if out is not None:
            kept = (out.places_N[part] >= 0).nonzero()[:, 0]
            rows = copies.weight_SW.index_select(0, kept).to(out.rows_LPw.dtype)
            out.rows_LPw[0].index_copy_(0, out.places_N[part].index_select(0, kept), rows)

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
