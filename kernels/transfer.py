"""Small host tensors on their way to the device, which the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`; a copy from the host is ordered before what is launched next.

    From pageable memory CUDA copies when the stream has come that far, and the host waits for it,
    `non_blocking` or not: the next pass is then not launched beside this one's backward. Through
    pinned memory nobody waits, and its allocator keeps the memory until the copy is done.

    Args:
        x: any tensor; may be overwritten as soon as this returns.
        device: where it is needed.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    # A tensor that is pinned already would be read where it lies.
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)
