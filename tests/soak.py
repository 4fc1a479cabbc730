"""Kill a saving run again and again, and see that nothing is lost: the driver of `tests/soak.sh`.

A small run that saves at every second step is killed with SIGKILL at a random moment (while it
starts, trains, saves or ends), started again, and so on until it is done; then the next run begins.
Every third run has two ranks under the launcher, of which a random one is killed first; the others
are one rank alone. Every other run has its table on disk, with a small cache. What must hold:

- before each start the newest checkpoint on disk that verifies is found by this driver; the run
  goes on from just that one, or from the start when there is none;
- a finished run has the losses, norms and checkpoint of one that nothing interrupted, bit for bit.

State is kept in the folder: called again, it goes on counting.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import load_file

from launcher import config, pretrain
from launcher.lifecycle import RunFolder
from parallel.checkpoint import list_checkpoints, verify
from tests.launcher.tiny import REPOSITORY, rows, tiny_config, tiny_corpus

EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "sample_cursor", "bits_per_byte", "skipped")
LIFE = 300.0
"""Seconds after which a life that neither ended nor was to be killed has hung."""


@dataclass
class Count:
    """What was done so far, over all calls."""

    kills: int = 0
    runs: int = 0
    resumed: int = 0
    from_start: int = 0
    unfinished: int = 0
    seconds: float = 0.0


class Soak:
    """Runs, kills and comparisons in one folder."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        """Go on with what the folder holds, or begin."""
        self.folder, self.path, self.steps = folder, folder / "soak.json", steps
        self.count = Count()
        if self.path.exists():
            self.count = Count(**json.loads(self.path.read_text()))
        elif not (folder / "corpus").exists():
            tiny_corpus(folder)
        self.generator = random.Random(f"{seed} {self.count.kills}")

    def run(self, kills: int, seconds: float) -> None:
        """Go on until so many kills in all, or so many seconds of this call."""
        start, before = time.monotonic(), self.count.seconds
        for world in (1, 2):
            self.reference(world)
        while self.count.kills < kills and time.monotonic() - start < seconds:
            world = 2 if self.count.runs % 3 == 2 else 1
            run = self.prepared(f"run-{self.count.runs}", world)
            done = self.life(run, world, last=False)
            self.count.seconds = before + time.monotonic() - start
            self.keep()
            if done:
                self.compare(run, world)
        while self.count.kills >= kills:
            # The run that was killed last must still end well.
            world = 2 if self.count.runs % 3 == 2 else 1
            run = self.prepared(f"run-{self.count.runs}", world)
            if not self.life(run, world, last=True):
                raise SystemExit(f"{run}: did not end")
            self.compare(run, world)
            break

    def keep(self) -> None:
        """Write the state."""
        self.path.write_text(json.dumps(vars(self.count)) + "\n")

    def prepared(self, name: str, world: int) -> Path:
        """Return a run folder, made when it is not there."""
        path = tiny_config(self.folder, self.folder / "corpus")
        tree = yaml.safe_load(path.read_text())
        tree["train"] |= {
            "steps": self.steps,
            "micro_batch": 4,
            "evaluate_every": 0,
            "sample_every": 0,
            "stats_every": 0,
        }
        tree["name"], tree["launch"]["processes"] = name, world
        tree["checkpoint"] = {"every": 2, "keep_last": 3}
        if name.startswith("run-") and self.count.runs % 2 == 1:
            # The bits are those of the run that is compared with, whose table is in memory.
            disk = {"tier": "nvme", "nvme_path": str(self.folder / "nvme"), "direct": False}
            tree["model"]["deepembed"] |= disk | {"cache_rows": 100}
        path.write_text(yaml.safe_dump(tree))
        cfg = pretrain.resolved(config.load(path))
        folder = RunFolder(Path(cfg.runs) / cfg.name).create()
        if not folder.config.exists():
            config.save(cfg, folder.config)
        return folder.root

    def start(self, run: Path, world: int) -> subprocess.Popen[bytes]:
        """Start a life of a run, its output in run/output."""
        worker = ["launcher.worker", str(run / "config.yaml"), "train"]
        words = worker if world == 1 else ["launcher", "pretrain", str(run / "config.yaml")]
        with (run / "output").open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def reference(self, world: int) -> Path:
        """Return the folder of a run that nothing interrupts, made when it is not there."""
        run = self.prepared(f"whole-{world}", world)
        if not (run / "DONE").exists():
            process = self.start(run, world)
            if process.wait(LIFE):
                raise SystemExit(f"{run}: {(run / 'output').read_text()}")
        return run

    def life(self, run: Path, world: int, last: bool) -> bool:
        """Start a run and kill it at a random moment (unless `last`); returns whether it ended."""
        newest = self.newest(run)
        process = self.start(run, world)
        # Half of the kills come some steps on, a quarter while it starts, a quarter by the clock
        # behind a step, where it saves.
        kind, drawn = self.generator.random(), self.generator.random()
        begun, stepped = time.monotonic(), 0.0
        target = newest or 0
        deadline = begun + (drawn * 8 if kind < 0.15 else LIFE)
        while process.poll() is None and (last or time.monotonic() < deadline):
            if not last and not stepped and self.heartbeat(run, begun) > target:
                stepped = time.monotonic()
                deadline = stepped + drawn * (0.3 if kind < 0.5 else 3.0)
            time.sleep(0.005)
            if last and time.monotonic() > begun + LIFE:
                raise SystemExit(f"{run}: hung; {(run / 'output').read_text()}")
        if process.poll() is None:
            self.kill(process)
            self.count.kills += 1
        elif process.returncode:
            raise SystemExit(f"{run}: failed; {(run / 'output').read_text()}")
        self.check_start(run, newest)
        return (run / "DONE").exists()

    @staticmethod
    def heartbeat(run: Path, begun: float) -> int:
        """Return the step of the newest heartbeat of this life, -1 when there is none yet."""
        try:
            beat = json.loads((run / "heartbeat").read_text())
        except (OSError, ValueError):
            return -1
        started = time.time() - (time.monotonic() - begun)
        return int(beat["step"]) if beat["time"] > started and beat["doing"] == "step" else -1

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill everything of a life, in random order."""
        parent = psutil.Process(process.pid)
        everyone = [parent, *parent.children(recursive=True)]
        self.generator.shuffle(everyone)
        for victim in everyone:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait()

    def newest(self, run: Path) -> int | None:
        """Return the step of the newest intact checkpoint, as the files say."""
        found: int | None = None
        for info in list_checkpoints(run / "checkpoints"):
            self.count.unfinished += not info.committed
            if info.committed and not verify(info.path):
                found = info.step
        return found

    def check_start(self, run: Path, newest: int | None) -> None:
        """See that a life went on from the checkpoint that it had to."""
        output = (run / "output").read_text(errors="replace")
        said = re.search(r"resuming from step (\d+)", output)
        if said is None:
            # Killed before it could say so; or a new run.
            self.count.from_start += newest is None
            if newest is not None and "step" in output and re.search(r"^step +1/", output, re.M):
                raise SystemExit(f"{run}: began anew beside a checkpoint of step {newest}")
            return
        self.count.resumed += 1
        if newest is None or int(said[1]) != newest:
            raise SystemExit(f"{run}: resumed from {said[1]}, the newest intact one was {newest}")

    def compare(self, run: Path, world: int) -> None:
        """Compare a finished run with the one that nothing interrupted; then remove it."""
        whole = self.reference(world)
        expected, found = rows(whole), rows(run)
        if [r["step"] for r in found] != list(range(1, self.steps + 1)):
            raise SystemExit(f"{run}: {len(found)} lines for {self.steps} steps")
        for a, b in zip(expected, found, strict=True):
            if any(a[k] != b[k] for k in EXACT):
                raise SystemExit(f"{run}: step {a['step']} is {b}, not {a}")
        if (run / "validation.jsonl").read_text() != (whole / "validation.jsonl").read_text():
            raise SystemExit(f"{run}: another validation loss")
        ours, theirs = (final(place, self.steps) for place in (run, whole))
        if ours.keys() != theirs.keys() or not all(ours[k].equal(t) for k, t in theirs.items()):
            raise SystemExit(f"{run}: the last checkpoint holds other numbers")
        shutil.rmtree(run)
        self.count.runs += 1
        self.keep()


def final(run: Path, step: int) -> dict[str, Any]:
    """Return every tensor of a run's last checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file.name} {key}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def main() -> None:
    """Run; the exit code is 0 when nothing was lost."""
    p = argparse.ArgumentParser(description="Kill a saving run again and again.")
    p.add_argument("--folder", type=Path, default=Path(".cache/soak"), help="runs and state")
    p.add_argument("--kills", type=int, default=200, help="in all, those of earlier calls included")
    p.add_argument("--minutes", type=float, default=1e6, help="of this call")
    p.add_argument("--steps", type=int, default=240, help="of each run; the same in every call")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(a.folder.resolve(), a.steps, a.seed)
    soak.run(a.kills, 60 * a.minutes)
    c = soak.count
    print(
        f"{c.kills} kills, {c.resumed} starts that resumed, {c.from_start} new ones, "
        f"{c.unfinished} unfinished folders met, {c.runs} runs ended bitwise as uninterrupted "
        f"ones, {c.seconds / 60:.1f} min"
    )


if __name__ == "__main__":
    main()
