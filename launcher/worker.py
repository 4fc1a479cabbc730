"""One rank of a run: `python -m launcher.worker CONFIG.yaml train|evaluate|generate [JSON]`.

Started by `launcher.ranks`, never by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher import config
from launcher.components import Components, build
from launcher.evaluate import text_sample, validate
from launcher.lifecycle import RunFolder
from launcher.resume import restore
from launcher.train import Trainer
from tiny_onn.generation import Sampling


def train(cfg: config.RunConfig, folder: RunFolder) -> None:
    """Train until the end or a request to stop; marks the run done at the end."""
    trainer = Trainer(cfg, folder)
    outcome = trainer.train()
    trainer.c.close()
    dist.barrier()
    if outcome == "done" and trainer.c.mesh.rank == 0:
        folder.mark_done(trainer.c.step)


def evaluate(c: Components, arguments: dict[str, Any]) -> str:
    """Return the validation of a checkpoint as a JSON line."""
    result = validate(c, int(arguments.get("sequences", 0)))
    return json.dumps({"step": c.step, **result.__dict__})


def generate(c: Components, arguments: dict[str, Any]) -> str:
    """Return text from a checkpoint."""
    sampling = Sampling(
        float(arguments["temperature"]), float(arguments["top_p"]), int(arguments["seed"])
    )
    return text_sample(c, str(arguments["prompt"]), int(arguments["tokens"]), sampling)


def main(argv: Sequence[str]) -> int:
    """Run one rank."""
    cfg = config.load(Path(argv[0]))
    folder = RunFolder(Path(cfg.runs) / cfg.name)
    if argv[1] == "train":
        train(cfg, folder)
    else:
        arguments = json.loads(argv[2])
        c = build(cfg, RunFolder(folder.root / "evaluation").create(), folder.checkpoints)
        restore(c, step=arguments.get("step"))
        text = {"evaluate": evaluate, "generate": generate}[argv[1]](c, arguments)
        c.close()
        if c.mesh.rank == 0:
            print(text, flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
