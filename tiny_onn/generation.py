"""Sampling from the model one token at a time, through caches that hold what NSA needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.rows import RowIndex

RowsOf = Callable[[Tensor], tuple[Sequence[Tensor] | None, RowIndex | None]]
"""ids_T -> (layers, index): the DeepEmbed rows of some tokens, [U, W] of every layer."""


@dataclass
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest set of tokens with this probability mass is drawn from; 1 is all.
        seed: of the draw's own generator, so that ranks in lockstep draw alike.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one id from fp32 logits [V]."""
    logits_V = logits_V.float().cpu()
    if sampling.temperature <= 0:
        return int(logits_V.argmax())
    p_V = torch.softmax(logits_V / sampling.temperature, dim=0)
    sorted_p, order = p_V.sort(descending=True, stable=True)
    outside = sorted_p.cumsum(0) - sorted_p >= sampling.top_p
    sorted_p[outside] = 0.0
    return int(order[torch.multinomial(sorted_p, 1, generator=generator)])


@torch.no_grad()
def generate(
    forward: Callable[..., Tensor],
    model: nn.Module,
    prompt: Sequence[int],
    max_new: int,
    *,
    sampling: Sampling | None = None,
    rows: RowsOf | None = None,
    end: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield up to `max_new` ids that continue the prompt.

    Args:
        forward: calls the model (an engine's forward under ZeRO-3, else the model itself).
        model: the TinyOnn, for its caches; put in evaluation mode by the caller.
        prompt: ids, at least one (the begin-of-document id counts).
        max_new: most ids to yield.
        sampling: how to draw.
        rows: fetches DeepEmbed rows when the table lives outside the model.
        end: id that ends the text; it is not yielded.
        device: where the model is.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("generate needs a prompt of at least one token (the document start)")
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    caches = model.new_caches()  # type: ignore[operator]
    one = torch.ones((), device=device)
    pending, new = list(prompt), 0
    while new < max_new:
        for token in pending:
            ids = torch.tensor([token])
            layers, index = rows(ids) if rows is not None else (None, None)
            logits = forward(ids.to(device), None, None, one, layers, index, caches)
        token = draw(logits[-1], sampling, generator)
        if token == end:
            return
        yield token
        pending, new = [token], new + 1
