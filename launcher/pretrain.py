"""`tiny-onn pretrain CONFIG [--dotted.key value …]`: this node's share of a run.

Everything cheap is checked before anything expensive starts: the configuration, whether the run is
done or was started under another configuration, the corpus. Then the node's ranks are started; they
resume by themselves. Running the same command again goes on where the run stands.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.build import build as build_corpus
from data.index import StoreAwayError
from data.loader import open_corpus
from data.patient import CONNECT_TIMEOUT, TIMEOUT
from data.stored import is_remote
from launcher import config
from launcher.components import accumulation
from launcher.config import ConfigError, RunConfig
from launcher.lifecycle import RunError, RunFolder
from launcher.path_verb import run_folder
from launcher.ranks import launch, ranks_per_node, world_size
from launcher.summary import summary

USAGE = """usage: tiny-onn pretrain CONFIG [--dotted.key value ...]

Train a model, or go on with a run that was interrupted. CONFIG is a YAML file; every key can be
overridden on the command line.

example:
  tiny-onn pretrain launcher/configs/demo.yaml --name trial --train.steps 50 --model.width 128

keys:
"""


def main(argv: Sequence[str]) -> int:
    """Run this node's share; returns 0 when the run is done or was asked to stop."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        config.parser().print_help()
        return 0 if argv else 2
    path, overrides = Path(argv[0]), list(argv[1:])
    cfg, folder = configured(path, overrides)
    cfg.name, cfg.runs = folder.root.name, str(folder.root.parent)
    node = int(os.environ.get("NODE_RANK", "0"))
    if folder.done.exists():
        print(f"run {folder.root} is done; train on under another --name")
        print(summary(folder.root))
        return 0
    try:
        config.validate(cfg)
        accumulation(cfg, world_size(cfg.launch), ranks_per_node(cfg.launch))
        prepare_corpus(cfg, node)
        cfg = resolved(cfg)
        agree_with_saved(cfg, folder)
    except StoreAwayError:
        # The next try may find it back; how many there are is the job's budget.
        raise
    except ValueError as e:
        # A job must not be queued again for what trying again cannot mend.
        folder.refuse(str(e))
        raise
    folder.create()
    if node == 0:
        config.save(cfg, folder.config)
    mine = folder.logs / f"{folder.attempt}-node{node}.yaml"
    config.save(cfg, mine)
    code = launch(["-m", "launcher.worker", str(mine), "train"], folder, cfg.launch)
    if code == 0 and node == 0:
        if folder.done.exists():
            print(summary(folder.root))
        else:
            print(f"stopped with a checkpoint; the same command goes on: {_command(argv)}")
    return code


def configured(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunFolder]:
    """Read the configuration; in the folder of its run is left word when that is impossible."""
    try:
        cfg = config.load(path, overrides)
    except ConfigError as e:
        if path.exists():
            RunFolder(run_folder(path, overrides)).refuse(str(e))
        raise
    return cfg, RunFolder(run_folder(path, overrides))


def _command(argv: Sequence[str]) -> str:
    return f"bash slurm/pretrain.sh {shlex.join(argv)}"


def resolved(cfg: RunConfig) -> RunConfig:
    """Fill in what the corpus decides; raises ConfigError where the two contradict each other."""
    corpus = open_corpus(cfg.data)
    corpus.check([cfg.data.train_split, cfg.data.validation_split])
    size = corpus.index.vocab_size
    if cfg.model.vocab_size not in (0, size):
        raise ConfigError(
            f"model.vocab_size is {cfg.model.vocab_size}, but the tokenizer of {cfg.data.path} has "
            f"{size} ids; leave model.vocab_size at 0 to take the tokenizer's"
        )
    cfg.model.vocab_size = size
    # The last attempt may begin just before patience ends.
    wait = cfg.data.patience + CONNECT_TIMEOUT + TIMEOUT
    if is_remote(cfg.data.path) and 0 < cfg.launch.step_timeout <= wait:
        raise ConfigError(
            f"data.patience is {cfg.data.patience:g} s and launch.step_timeout "
            f"{cfg.launch.step_timeout:g} s: while the store is away the run would be taken for "
            f"hung; make the second larger than {wait:g} s"
        )
    return cfg


def prepare_corpus(cfg: RunConfig, node: int) -> None:
    """Build the corpus when the configuration says how and it is not there; node 0 builds it.

    Raises:
        ConfigError: there is no corpus and no recipe for one.
        RunError: node 0 did not finish it within launch.first_step_timeout.
    """
    if is_remote(cfg.data.path):
        return
    path = Path(cfg.data.path)
    index = path / "index.json"
    if index.exists():
        return
    if cfg.data.build is None:
        raise ConfigError(
            f"data.path {path} holds no corpus (no index.json); build one:\n"
            f"  tiny-onn data build --input DIR --out {path} --seq_len {cfg.data.seq_len}"
        )
    if node == 0:
        print(f"building the corpus {path} from {', '.join(cfg.data.build.input)}", flush=True)
        build_corpus(cfg.data.build, path, seq_len=cfg.data.seq_len)
        return
    deadline = time.monotonic() + (cfg.launch.first_step_timeout or float("inf"))
    while not index.exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"node {node} waited for node 0 to build {path} in vain; is it on a file system "
                "that all nodes share?"
            )
        time.sleep(1.0)


def agree_with_saved(cfg: RunConfig, folder: RunFolder) -> None:
    """Refuse to go on with a run under a configuration that contradicts its own."""
    if not folder.config.exists():
        return
    conflicts = config.difference(config.load(folder.config), cfg)
    if conflicts:
        lines = "\n  ".join(conflicts)
        raise ConfigError(
            f"{folder.config} was started with another configuration:\n  {lines}\n"
            "start a new run with --name, or drop the overrides to go on with this one"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
