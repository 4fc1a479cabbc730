"""What the backward pass finds of the forward pass: everything, or each block's input to redo it.

    none        every activation stays
    recompute   each block's input stays on the device; the block runs again in the backward pass
    offload     each block's input goes to (pinned) host memory and comes back for that

A tensor inside a block may be kept beside that (`Activations.keep`) where redoing it costs more
than the way to host memory and back.

On a GPU the copies run on a stream of their own, beside the next block's forward and, as the input
of the block before is asked for one block early, beside a block's backward.

Shapes: T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "recompute", "offload"]


def checkpointing_of(value: str | bool) -> Checkpointing:
    """Read the setting; True and False are its earlier names of "recompute" and "none".

    Raises:
        ValueError: none of them.
    """
    if isinstance(value, bool):
        return "recompute" if value else "none"
    for kind in get_args(Checkpointing):
        if value == kind:
            return kind  # type: ignore[no-any-return]
    raise ValueError(
        f"model.activation_checkpointing {value!r} is none of {', '.join(get_args(Checkpointing))}"
    )


class _Away:
    """A block's input that spends the time between its two uses in host memory."""

    def __init__(self, x_TC: Tensor, below: _Away | None, stream: torch.cuda.Stream | None) -> None:
        """Start copying; `below` is what the backward pass wants after this one."""
        self._here: Tensor | None = x_TC
        self._below, self._stream = below, stream
        self._requires_grad, self._device = x_TC.requires_grad, x_TC.device
        self._back: tuple[Tensor, torch.cuda.Event] | None = None
        x_TC = x_TC.detach()
        if stream is None:
            self._host = x_TC.clone()
            return
        self._host = torch.empty(x_TC.shape, dtype=x_TC.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(x_TC, non_blocking=True)
        x_TC.record_stream(stream)

    def take(self) -> Tensor:
        """Return the input itself the first time, its copy the second time."""
        if self._here is not None:
            here, self._here = self._here, None
            return here
        if self._stream is None:
            return self._host.clone().requires_grad_(self._requires_grad)
        self._fetch()
        assert self._back is not None
        (x_TC, arrived), self._back = self._back, None
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if self._below is not None:
            self._below._fetch()
            self._below = None
        return x_TC.requires_grad_(self._requires_grad)

    def _fetch(self) -> None:
        if self._back is not None or self._stream is None:
            return
        x_TC = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        # Its memory may still be read by kernels of whoever had it before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            x_TC.copy_(self._host, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(self._stream)
        self._back = x_TC, arrived


class _Kept:
    """A block's inner tensor that waits for the backward pass, on a GPU in host memory.

    The newest stays where it is until the next one comes: the backward pass begins with it.
    """

    def __init__(self, x: Tensor, below: _Kept | None, stream: torch.cuda.Stream | None) -> None:
        """Hold `x`; `below` is what the backward pass wants after this one."""
        self._here: Tensor | None = x
        self._below, self._stream = below, stream
        self._host: Tensor | None = None
        self._back: tuple[Tensor, torch.cuda.Event] | None = None
        self._device = x.device

    def leave(self) -> None:
        """Go to host memory."""
        x, stream = self._here, self._stream
        if x is None or stream is None:
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        self._here = None

    def take(self) -> Tensor:
        """Return the tensor, once; the one below starts on its way back."""
        x, self._here = self._here, None
        if x is None:
            self._fetch()
            assert self._back is not None
            (x, arrived), self._back = self._back, None
            torch.cuda.current_stream(self._device).wait_event(arrived)
        below, self._below = self._below, None
        if below is not None:
            below._fetch()
        return x

    def _fetch(self) -> None:
        if self._back is not None or self._host is None or self._stream is None:
            return
        x = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        # Its memory may still be read by kernels of whoever had it before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            x.copy_(self._host, non_blocking=True)
        self._back, self._host = (x, self._stream.record_event()), None


class Activations:
    """Runs the blocks of one forward pass, keeping of each what the setting says."""

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012

    def __init__(self, kind: Checkpointing) -> None:
        """Begin a forward pass."""
        self.kind = kind if torch.is_grad_enabled() else "none"
        self._last: _Away | None = None
        self._kept: _Kept | None = None

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        """Keep a tensor of a block that is being run for the first time; of every block or none.

        Returns:
            What gives it back, once, in the backward pass.
        """
        if torch._C._current_graph_task_id() != -1:
            # The block runs again; what its backward pass uses was kept before.
            return lambda: x
        if self._kept is not None:
            self._kept.leave()
        self._kept = _Kept(x, self._kept, self._stream(x.device))
        return self._kept.take

    def run(self, block: Callable[..., Tensor], x_TC: Tensor, *rest: Any) -> Tensor:
        """Return `block(x_TC, *rest)`."""
        if self.kind == "none":
            return block(x_TC, *rest)
        if self.kind == "recompute":
            out: Tensor = checkpoint(block, x_TC, *rest, use_reentrant=False)
            return out
        self._last = away = _Away(x_TC, self._last, self._stream(x_TC.device))
        del x_TC
        out = checkpoint(lambda *given: block(away.take(), *given), *rest, use_reentrant=False)
        return out

    @classmethod
    def _stream(cls, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in cls._streams:
            cls._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return cls._streams[device]
