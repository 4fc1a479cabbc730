"""Where the time of a few steps goes: a trace for Perfetto or TensorBoard, and a table as text.

`train.trace_at: N` records `train.trace_steps` steps from step N on, on rank 0, into
`runs/NAME/traces/`: `step-N.json.gz` (open it in Perfetto, or in TensorBoard with its profiler
plug-in) and `step-N.txt`, the operations by time on the device and on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 60
"""Operations in each half of the table."""


class Trace:
    """Records steps `at` .. `at + steps - 1`; does nothing when `at` is 0."""

    def __init__(self, folder: Path, at: int, steps: int, device: torch.device) -> None:
        """Record into `folder`, which is made when there is something to write.

        Args:
            folder: for the traces.
            at: first recorded step, counted from 1; 0 records none.
            steps: how many.
            device: where the steps compute.
        """
        self._folder, self._at, self._steps, self._device = folder, at, steps, device
        self._profile: profile | None = None

    def step(self, finished: int) -> None:
        """Call it after every step (and once before the first), with the last finished one."""
        if self._profile is not None and finished + 1 == self._at + self._steps:
            self._stop()
        elif self._at > 0 and self._profile is None and finished + 1 == self._at:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def close(self) -> None:
        """Write what was recorded of a run that ends early."""
        if self._profile is not None:
            self._stop()

    def _stop(self) -> None:
        assert self._profile is not None
        recorded, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        recorded.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"step-{self._at:08d}"
        recorded.export_chrome_trace(str(self._folder / f"{stem}.json.gz"))
        (self._folder / f"{stem}.txt").write_text(table(recorded.key_averages(), self._steps))


def table(events: Any, steps: int) -> str:
    """Return operations by their own time on the device, then on the host, in ms per step."""
    columns: list[tuple[str, Callable[[Any], float]]] = [
        ("device", lambda e: float(e.self_device_time_total)),
        ("host", lambda e: float(e.self_cpu_time_total)),
    ]
    lines = []
    for title, time_of in columns:
        total = sum(time_of(e) for e in events)
        lines.append(f"{title}: {total / 1000 / steps:.2f} ms per step")
        lines.append(f"{'ms':>10} {'share':>6} {'calls':>8}  operation")
        for event in sorted(events, key=time_of, reverse=True)[:ROWS]:
            share = time_of(event) / max(total, 1e-9)
            if time_of(event) > 0:
                lines.append(
                    f"{time_of(event) / 1000 / steps:10.3f} {share:6.1%} "
                    f"{event.count / steps:8.1f}  {event.key[:100]}"
                )
        lines.append("")
    return "\n".join(lines)
