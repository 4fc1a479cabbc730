"""Copies to a GPU come from pinned memory and are not waited for; elsewhere nothing is copied."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from kernels.transfer import to_device

CUDA = torch.device("cuda", 0)


def test_a_copy_to_a_gpu_goes_through_pinned_memory_and_does_not_block() -> None:
    x = torch.arange(6).view(2, 3)
    asked: dict[str, Any] = {}
    sent: list[tuple[torch.Tensor, torch.device, dict[str, Any]]] = []
    empty = torch.empty

    def pinned(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.update(pin_memory=pin_memory)
        return empty(shape, dtype=dtype)

    def to(tensor: torch.Tensor, device: torch.device, **words: Any) -> torch.Tensor:
        sent.append((tensor, device, words))
        return tensor

    # This machine has no GPU: what torch is asked for is what can be seen.
    with mock.patch("torch.empty", pinned), mock.patch.object(torch.Tensor, "to", to):
        to_device(x, CUDA)
    ((tensor, device, words),) = sent
    assert asked == {"pin_memory": True} and words == {"non_blocking": True} and device == CUDA
    assert tensor is not x and tensor.equal(x)


def test_on_the_cpu_it_is_the_tensor_itself() -> None:
    x = torch.ones(3)
    assert to_device(x, torch.device("cpu")) is x


@pytest.mark.gpu
def test_what_was_sent_may_be_overwritten_at_once() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.arange(1 << 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        y = to_device(x, device)
        x.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.cpu().equal(torch.arange(1 << 20))
