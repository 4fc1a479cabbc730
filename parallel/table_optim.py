"""Optimizers of table rows: only rows with a gradient move, and each row keeps its own clock.

`adam` on a row touched in every step is torch.optim.Adam. On the others it is lazy: moments do not
decay in steps that do not touch the row, and bias correction goes by the steps that touched it
("steps" of the row), so that the first step of a rare token has the size of the first step of a
common one. The row-wise kinds keep one second moment, of the mean squared gradient, for a whole row
(or for each of `groups` equal parts of it, such as layers): arXiv 1807.01774 does it for Adagrad.

Shapes: N touched rows, W columns, M second moments per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.table_layout import TableConfig

Fields = dict[str, Tensor]


def update_rows(cfg: TableConfig, fields: Fields, grad_NW: Tensor, lr: float) -> None:
    """Step N distinct rows in place.

    Args:
        cfg: optimizer kind, betas, eps and weight decay.
        fields: fp32 copies of the rows' fields, `RowLayout.of(cfg.optimizer, ...)`; overwritten.
        grad_NW: fp32 gradients, clipped already.
        lr: learning rate, multiplier included.
    """
    weight_NW = fields["weight"]
    if cfg.weight_decay:
        weight_NW.mul_(1.0 - lr * cfg.weight_decay)
    if cfg.optimizer == "adagrad_rowwise":
        sum_sq_NM = fields["sum_sq"]
        sum_sq_NM.add_(_mean_square(grad_NW, sum_sq_NM.shape[1]))
        denominator_NM = sum_sq_NM.sqrt().add_(cfg.eps)
        _add_scaled(weight_NW, grad_NW * -lr, denominator_NM)
        return
    beta1, beta2 = cfg.betas
    # In fp64, as torch.optim.Adam computes its scalars.
    steps_N1 = fields["steps"].add_(1.0).double()
    step_size_N1 = (-lr / (1.0 - beta1**steps_N1)).float()
    root_correction_N1 = (1.0 - beta2**steps_N1).sqrt().float()
    exp_avg_NW, exp_avg_sq = fields["exp_avg"], fields["exp_avg_sq"]
    exp_avg_NW.lerp_(grad_NW, 1.0 - beta1)
    if cfg.optimizer == "adam":
        exp_avg_sq.mul_(beta2).addcmul_(grad_NW, grad_NW, value=1.0 - beta2)
    else:
        square_NM = _mean_square(grad_NW, exp_avg_sq.shape[1])
        exp_avg_sq.mul_(beta2).add_(square_NM, alpha=1.0 - beta2)
    denominator = exp_avg_sq.sqrt().div_(root_correction_N1).add_(cfg.eps)
    _add_scaled(weight_NW, exp_avg_NW * step_size_N1, denominator)


def _mean_square(grad_NW: Tensor, groups: int) -> Tensor:
    return grad_NW.view(grad_NW.shape[0], groups, -1).square().mean(dim=2)


def _add_scaled(weight_NW: Tensor, step_NW: Tensor, denominator: Tensor) -> None:
    """Add step / denominator, whose columns may stand for equal groups of the row's."""
    rows, groups = denominator.shape
    step_NW.view(rows, groups, -1).div_(denominator[:, :, None])
    weight_NW.add_(step_NW)


class GradientSum:
    """Gradients of distinct rows, summed over the micro-batches of a step in their order.

    Attributes:
        index_N: touched local rows, sorted, int64 [N].
        grad_NW: their gradients, fp32.
        batches: micro-batches added.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.index_N = torch.empty(0, dtype=torch.int64, device=device)
        self.grad_NW = torch.empty(0, width, device=device)
        self.batches = 0

    def add(self, index_N: Tensor, grad_NW: Tensor) -> None:
        """Add a micro-batch's gradients of the sorted distinct rows `index_N`; takes them over.

        bf16 gradients become fp32 here, behind the copy from the device.
        """
        grad_NW = grad_NW.float()
        self.batches += 1
        if self.batches == 1:
            self.index_N, self.grad_NW = index_N, grad_NW
            return
        union = torch.unique(torch.cat((self.index_N, index_N)))
        if union.shape[0] > self.index_N.shape[0]:
            merged = self.grad_NW.new_zeros(union.shape[0], self.grad_NW.shape[1])
            merged.index_copy_(0, torch.searchsorted(union, self.index_N), self.grad_NW)
            self.index_N, self.grad_NW = union, merged
        # Positions are distinct, so that no two terms of this call meet in one row.
        self.grad_NW.index_add_(0, torch.searchsorted(self.index_N, index_N), grad_NW)


def squared_norm(grad_NW: Tensor) -> Tensor:
    """Return the sum of squares of fp32 or bf16 rows, fp64 0-dim: fp32 by row, added in fp64."""
    norm_N: Tensor = torch.linalg.vector_norm(grad_NW, dim=1, dtype=torch.float32)
    return norm_N.double().square().sum()
