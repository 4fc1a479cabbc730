"""The output head and its cross entropy: logits of a chunk of tokens exist, never all of them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
"""Label of a token that has nothing to predict (end of a document, padding)."""

ENTROPY_TOKENS = 256
"""Tokens of a batch, about, over which the entropy of the predictions is measured."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a linear head; its gradients are formed chunk by chunk, ahead.

    The gradient of the sum is linear in the upstream scalar, so forming it while the logits are at
    hand costs one product less than recomputing them, and holds [chunk, V] instead of [T, V].
    """

    @staticmethod
    def forward(
        ctx: Any, x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, chunk: int, need_grad: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_TC.device)
        dx_TC = torch.empty_like(x_TC) if need_grad else None
        dw_VC = (
            torch.zeros(weight_VC.shape, dtype=torch.float32, device=x_TC.device)
            if need_grad
            else None
        )
        for lo in range(0, x_TC.shape[0], chunk):
            x, labels = x_TC[lo : lo + chunk], labels_T[lo : lo + chunk]
            logits = (x @ weight_VC.t()).float()
            lse = torch.logsumexp(logits, dim=-1)
            keep = labels != IGNORE
            index = labels.clamp(min=0)[:, None]
            picked = logits.gather(1, index)[:, 0]
            total += torch.where(keep, lse - picked, 0.0).sum()
            if dx_TC is not None and dw_VC is not None:
                grad = logits.sub_(lse[:, None]).exp_()
                grad.scatter_add_(1, index, torch.full_like(picked, -1.0)[:, None])
                grad *= keep[:, None]
                grad = grad.to(x.dtype)
                torch.mm(grad, weight_VC, out=dx_TC[lo : lo + chunk])
                dw_VC += grad.t() @ x
        if dx_TC is not None and dw_VC is not None:
            ctx.save_for_backward(dx_TC, dw_VC)
            ctx.weight_dtype = weight_VC.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_TC, dw_VC = ctx.saved_tensors
        return (
            dx_TC * grad.to(dx_TC.dtype),
            (dw_VC * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def cross_entropy_sum(x_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, chunk: int) -> Tensor:
    """Sum of next-token cross entropy in nats over the labelled tokens, fp32 0-dim.

    Args:
        x_TC: final hidden states [T, C], fp32 or bf16.
        weight_VC: head weight [V, C], same dtype.
        labels_T: int64 [T], IGNORE where there is nothing to predict.
        chunk: tokens whose logits exist at once (liger-kernel chooses its own number, so that a
            chunk's logits take about the memory of `x_TC`); at least 1.

    Raises:
        ValueError: no token in a chunk.

    On a GPU liger-kernel's fused linear cross entropy does the work where it is installed (extra
    `gpu`); it forms the same gradients ahead, with the log-sum-exp in fp32 and the weight's
    gradient summed in fp32, and scales them by the upstream scalar in the backward.
    """
    if chunk < 1:
        raise ValueError(f"cross entropy over chunks of {chunk} tokens: at least 1 is needed")
    if x_TC.is_cuda and _liger_is_installed():
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        fused = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32
        )
        return fused(weight_VC, x_TC, labels_T).float()  # type: ignore[no-any-return]
    need_grad = torch.is_grad_enabled() and (x_TC.requires_grad or weight_VC.requires_grad)
    return _ChunkedCrossEntropy.apply(x_TC, weight_VC, labels_T, chunk, need_grad)  # type: ignore[no-any-return, no-untyped-call]


@cache
def _liger_is_installed() -> bool:
    return find_spec("liger_kernel") is not None


class Head(nn.Module):
    """Linear map to the vocabulary, its weight its own or the input embedding's."""

    def __init__(
        self, vocab_size: int, width: int, std: float, tied: nn.Parameter | None, chunk: int
    ) -> None:
        """Use `tied` as the weight [V, C] when given, else draw one of standard deviation `std`."""
        super().__init__()
        self.chunk = chunk
        self.record = False
        self.stats: dict[str, Tensor] = {}
        if tied is not None:
            self.weight = tied
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, width))
            nn.init.normal_(self.weight, std=std)

    def forward(self, x_TC: Tensor, labels_T: Tensor | None = None) -> Tensor:
        """Return summed cross entropy (fp32 0-dim), or fp32 logits [T, V] without labels."""
        if labels_T is None:
            return (x_TC @ self.weight.t()).float()
        if self.record:
            self._record(x_TC)
        return cross_entropy_sum(x_TC, self.weight, labels_T, self.chunk)

    @torch.no_grad()
    def _record(self, x_TC: Tensor) -> None:
        """Keep the mean entropy of the predictions, nats, over tokens spread through the batch."""
        every = max(1, x_TC.shape[0] // ENTROPY_TOKENS)
        log_p = torch.log_softmax((x_TC[::every] @ self.weight.t()).float(), dim=-1)
        self.stats = {"entropy": -(log_p.exp() * log_p).sum(-1).mean()}
