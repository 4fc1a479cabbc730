"""`tiny-onn path CONFIG [overrides]`: where a run lives, without loading anything heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml


def run_folder(config: Path, overrides: Sequence[str]) -> Path:
    """Return RUNS/NAME from the YAML file and `--name`, `--runs` overrides; the last one wins."""
    try:
        tree = yaml.safe_load(config.read_text()) or {}
    except yaml.YAMLError as e:
        raise ValueError(f"{config}: not valid YAML: {e}") from None
    values = {"name": str(tree.get("name", config.stem)), "runs": str(tree.get("runs", "runs"))}
    words = list(overrides)
    for i, word in enumerate(words):
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in values:
            if not equals and i + 1 == len(words):
                raise ValueError(f"--{key} needs a value")
            values[key] = value if equals else words[i + 1]
    return Path(values["runs"]) / values["name"]


def main(argv: Sequence[str]) -> int:
    """Print the folder."""
    p = argparse.ArgumentParser(
        prog="tiny-onn path",
        description="Print the run folder of a configuration.",
        epilog="example: tiny-onn path launcher/configs/demo.yaml --name trial",
    )
    p.add_argument("config", type=Path)
    known, overrides = p.parse_known_args(argv)
    print(run_folder(known.config, overrides))
    return 0
