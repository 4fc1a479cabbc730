"""Host memory that is allocated once and takes a copy of the state at every save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.table_tiers import RESERVE, available_host_bytes

PINNED_FROM = 2**20
"""Smaller buffers are not worth the call that pins them."""


class HostBuffers:
    """Copies of tensors by name, in memory that stays.

    On a GPU machine it is pinned, so that a copy runs at the full speed of the bus. It is pinned in
    place: torch's own allocator of pinned memory rounds every size up to a power of two.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Hold nothing yet."""
        self._device = mesh.device
        self._mesh = mesh
        self._buffers: dict[str, Tensor] = {}
        self._pinned: list[int] = []

    def has_room(self, needed: int) -> bool:
        """Whether every rank of this machine may still take `needed` bytes, its alike."""
        return needed * self._mesh.local_world <= available_host_bytes() * (1 - RESERVE)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor; the copy is whole after `wait`, and is overwritten by the next one."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = self._new(tensor)
        buffer.copy_(tensor.detach(), non_blocking=True)
        return buffer

    def wait(self) -> None:
        """Wait until all copies are whole."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Give the memory back."""
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._pinned, self._buffers = [], {}

    def _new(self, tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        if self._device.type == "cuda" and buffer.nbytes >= PINNED_FROM:
            error = _cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
            if int(error):
                raise RuntimeError(
                    f"cannot pin {buffer.nbytes:,} bytes of host memory for checkpoints (CUDA "
                    f"error {error}): raise the limit of locked memory, or set "
                    "checkpoint.background: false"
                )
            self._pinned.append(buffer.data_ptr())
        return buffer


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
