"""What a model can do: validation loss, and a sample of text; both are collective calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from data.index import DataError
from data.loader import Batch
from kernels.rows import RowIndex
from tiny_onn.generation import Sampling, generate

if TYPE_CHECKING:
    from launcher.components import Components


@dataclass(frozen=True)
class Validation:
    """Loss on held-out text.

    Attributes:
        loss: nats per label.
        bits_per_byte: bits per UTF-8 byte that the labels stand for.
        labels: labels that were predicted.
        bytes: UTF-8 bytes that they stand for.
    """

    loss: float
    bits_per_byte: float
    labels: int
    bytes: int


@contextmanager
def evaluating(c: Components) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, for the block."""
    model = c.engine.module
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if c.table is not None:
            # The rows that an evaluation fetched are no traffic of the next step.
            c.table.skip()


def validate(c: Components, sequences: int = 0) -> Validation:
    """Return the loss over the first `sequences` held-out sequences (0 takes all) of all ranks.

    Raises:
        DataError: a rank cannot read its sequences; on all ranks.
        ValueError: there is no held-out sequence.
    """
    device = c.engine.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    scale = torch.ones((), device=device)
    with evaluating(c):
        for batch in _batches(c, sequences):
            output = c.forward(batch, c.fetch_rows(batch.ids_T), scale)
            totals += torch.tensor(
                [0.0, float(batch.n_labels), float(c.label_bytes(batch.labels_T))],
                dtype=torch.float64,
                device=device,
            )
            totals[0] += output.nll_sum.double()
            c.watchdog.beat(c.step, "validation batch")
    dist.all_reduce(totals)
    nll, labels, n_bytes = totals.tolist()
    if not labels:
        raise ValueError(
            f"{c.cfg.data.path}: the validation split holds no sequence; build the corpus with a "
            "larger --validation-fraction"
        )
    return Validation(
        nll / labels, nll / math.log(2) / max(n_bytes, 1.0), int(labels), int(n_bytes)
    )


def _batches(c: Components, sequences: int) -> Iterator[Batch]:
    """Yield this rank's held-out batches; a rank that cannot read one ends it for all."""
    batches = c.loader.evaluation_batches(sequences)
    while True:
        batch: Batch | None = None
        failure: DataError | None = None
        try:
            batch = next(batches, None)
        except DataError as e:
            failure = e
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed)
        if failed:
            raise failure or DataError("another rank cannot read its held-out data")
        if batch is None:
            return
        yield batch


def text_sample(c: Components, prompt: str, tokens: int, sampling: Sampling | None = None) -> str:
    """Return the prompt and what the model says after it; every rank draws the same tokens."""
    tokenizer = c.tokenizer
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    with evaluating(c):
        drawn = list(
            generate(
                c.engine.forward,
                c.engine.module,
                start,
                tokens,
                sampling=sampling,
                rows=lambda ids_T: _layers_and_index(c, ids_T),
                end=tokenizer.eos_id,
                device=c.engine.device,
            )
        )
    return str(tokenizer.decode([*start[1:], *drawn]))


def _layers_and_index(
    c: Components, ids_T: Tensor
) -> tuple[Sequence[Tensor] | None, RowIndex | None]:
    rows = c.fetch_rows(ids_T)
    return (None, None) if rows is None else (rows.parts, rows.lookup)
