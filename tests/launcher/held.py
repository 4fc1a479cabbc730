"""`tiny-onn` with ranks that wait: STEP GATE VERB …, for tests that do something to a run then.

Behind the line of STEP and all later ones, or after everything but DONE for the STEP `end`, every
rank waits until it was asked to stop, or until the file GATE exists. A run that went on might end
while the test is held up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher import __main__, pretrain, worker
from launcher.lifecycle import StopReason, StopRequest
from launcher.ranks import launch
from launcher.train import Trainer


def arm(step: str, gate: Path) -> None:
    """Let this rank wait."""

    def wait(stop: StopRequest) -> None:
        while stop.signal is None and not gate.exists():
            time.sleep(0.01)

    requested: Callable[[StopRequest, int], StopReason] = StopRequest.requested
    train: Any = Trainer.train

    def held_requested(self: StopRequest, at: int) -> StopReason:
        if step != "end" and at >= int(step):
            wait(self)
        return requested(self, at)

    def held_train(self: Trainer) -> Any:
        outcome = train(self)
        if step == "end":
            wait(self.c.stop)
        return outcome

    StopRequest.requested = held_requested  # type: ignore[method-assign]
    Trainer.train = held_train  # type: ignore[method-assign]


def main(step: str, gate: str, *words: str) -> int:
    """Be the launcher, or with `rank` as the verb one of its ranks."""
    if words[0] == "rank":
        arm(step, Path(gate))
        return worker.main(words[1:])

    def start(arguments: Sequence[str], *others: Any) -> int:
        program, *own = arguments[1:]
        assert program == "launcher.worker"
        return launch(["-m", "tests.launcher.held", step, gate, "rank", *own], *others)

    pretrain.launch = start
    return __main__.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
