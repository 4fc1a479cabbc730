"""Which rank holds the others up, how much of a step waits for data, and who has the most memory.

In a step the ranks meet in every layer, so all of them take equally long and none can tell from its
own clock who was late. What differs is the time of work between two meetings. It is sampled: the
leaf modules of one block in the middle, whose bodies hold no collective under ZeRO-3 (weights are
gathered in hooks around them), are timed on the host, or on a GPU with events that are read when
they have passed anyway. The values travel with the reduction that agrees on stopping.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from parallel.mesh import Mesh


class Stragglers:
    """Times this rank's share of the work and compares it with the others'."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        """Add the clocks to a model with `blocks`; after DeepSpeed has added its own hooks."""
        self.device = mesh.device
        self._seconds = 0.0
        self._begun: list[Any] = []
        # torch.cuda.Event has no types.
        self._spans: list[tuple[Any, Any]] = []
        self._spare: list[Any] = []
        blocks = model.blocks
        assert isinstance(blocks, nn.ModuleList)
        for module in self._timed(blocks[len(blocks) // 2]):
            module.register_forward_pre_hook(self._start)
            # Before DeepSpeed's, which gives the weights back.
            module.register_forward_hook(self._end, prepend=True)

    def _timed(self, block: nn.Module) -> list[nn.Module]:
        """Modules whose bodies are work of this rank alone."""
        if self.device.type == "cuda" and getattr(block, "compile_blocks", False):
            # Norms and projections are not called as modules; ranks that share a sequence meet
            # in attention, and only DynMoE's layer remains.
            ffn = block.get_submodule("ffn")
            alone = block.get_submodule("attention").exchange is None
            return [block] if alone else [ffn]
        return [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]

    def begin(self) -> None:
        """Forget what was timed outside of steps (validation, samples of text)."""
        self._seconds = 0.0
        self._begun.clear()
        for span in self._spans:
            self._spare += span
        self._spans.clear()

    def facts(self, data_seconds: float, step_seconds: float, memory: int) -> list[float]:
        """Return what this rank tells the others about the step that has just ended.

        Args:
            data_seconds: for which it waited for its data.
            step_seconds: of the whole step.
            memory: bytes, see `launcher.step_record.memory_bytes`.

        Returns:
            Share of the step waited for data, seconds of work, bytes of memory.
        """
        for first, last in self._spans:
            # Never waited for; the step's loss has been read, so they have passed.
            if last.query():
                self._seconds += first.elapsed_time(last) / 1000
        return [data_seconds / max(step_seconds, 1e-9), self._seconds, float(memory)]

    @staticmethod
    def shares(facts: Sequence[Sequence[float]]) -> dict[str, float]:
        """Compare all ranks' facts about a step.

        Returns:
            `speed/slowest_share`: of its work's time, how long the mean rank waits for the slowest,
            0 … 1; `speed/slowest_rank`; `speed/data_stall_share`: of the step, how long the rank
            that waited longest for its data did; `speed/data_stall_rank`; `speed/memory_most_gib`
            of any rank; `speed/memory_most_rank`. Empty without facts.
        """
        if not facts:
            return {}
        stalls, work, memory = ([fact[i] for fact in facts] for i in range(3))
        slowest = max(work)
        share = 1.0 - sum(work) / len(work) / slowest if slowest > 0 else 0.0
        return {
            "speed/slowest_share": share,
            "speed/slowest_rank": float(work.index(slowest)),
            "speed/data_stall_share": max(stalls),
            "speed/data_stall_rank": float(stalls.index(max(stalls))),
            "speed/memory_most_gib": max(memory) / 2**30,
            "speed/memory_most_rank": float(memory.index(max(memory))),
        }

    def _start(self, module: nn.Module, args: object) -> None:
        if self.device.type != "cuda":
            self._begun.append(time.perf_counter())
        elif not torch.cuda.is_current_stream_capturing():
            self._begun.append(self._event())

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if not self._begun:
            return
        if self.device.type != "cuda":
            self._seconds += time.perf_counter() - self._begun.pop()
        elif not torch.cuda.is_current_stream_capturing():
            self._spans.append((self._begun.pop(), self._event()))

    def _event(self) -> Any:
        make: Any = torch.cuda.Event
        event = self._spare.pop() if self._spare else make(enable_timing=True)
        event.record()
        return event
