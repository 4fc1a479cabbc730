"""The configuration of a run: one dataclass per room, composed here, read from YAML and overrides.

`load` reads a YAML file and dotted overrides (`--model.width 512`), refuses unknown keys and wrong
types by name, and returns a typed `RunConfig`; `save` and `difference` keep a run from going on
under a configuration that is not its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import tempfile
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from data.config import DataConfig
from launcher.lifecycle import LaunchConfig
from launcher.redact import secret_in
from launcher.spikes import SpikeConfig
from parallel.checkpoint import CheckpointConfig
from parallel.engine_config import EngineConfig
from parallel.mesh import MeshConfig
from tiny_onn.modular import ModelConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


@dataclass
class TrainConfig:
    """What the loop does and how often.

    Attributes:
        steps: optimizer steps of the whole run.
        global_batch: sequences per optimizer step over all ranks; the accumulation follows from it.
        micro_batch: sequences per forward pass of a rank, or of the ranks that share them
            (mesh.group).
        evaluate_every: steps between validations; 0 validates only at the end.
        evaluate_sequences: sequences of a validation during training; 0 takes all. The last one
            always takes all.
        stats_every: steps between records of the sparse parts' statistics (histograms, images);
            0 is never.
        sample_every: steps between text samples; 0 is never.
        sample_prompt: what the samples start with.
        sample_tokens: length of a sample in tokens.
        trace_at: first of the steps whose operations rank 0 records into traces/; 0 records none.
        trace_steps: how many steps are recorded.
    """

    steps: int = 300
    global_batch: int = 8
    micro_batch: int = 4
    evaluate_every: int = 100
    evaluate_sequences: int = 64
    stats_every: int = 10
    sample_every: int = 100
    sample_prompt: str = "def "
    sample_tokens: int = 48
    trace_at: int = 0
    trace_steps: int = 3

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, by key."""
        for key in ("steps", "global_batch", "micro_batch", "trace_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key} is {getattr(self, key)}: set it to 1 or more")
        for key in ("evaluate_every", "stats_every", "sample_every", "trace_at"):
            if getattr(self, key) < 0:
                raise ConfigError(
                    f"train.{key} is {getattr(self, key)}: set it to 0 for never, or to 1 or more"
                )
        for key in ("evaluate_sequences", "sample_tokens"):
            if getattr(self, key) < 0:
                raise ConfigError(f"train.{key} is {getattr(self, key)}: set it to 0 or more")


@dataclass
class RunConfig:
    """Everything that defines a run.

    Attributes:
        name: the run's folder is RUNS/NAME.
        runs: folder of all runs, relative to the working directory.
        seed: seeds weights and random generators; the data order has data.shuffle_seed.
        data: corpus and loader.
        model: sizes and kinds.
        mesh: which ranks share a sequence.
        engine: precision, optimizer, schedule, offload.
        train: steps, batch, cadence.
        checkpoint: cadence and retention.
        spikes: steps that are not applied.
        launch: processes and time-outs.
    """

    name: str = "demo"
    runs: str = "runs"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


MAY_CHANGE = (
    "runs",
    "launch.",
    "mesh.",
    "checkpoint.",
    "spikes.",
    "data.path",
    "data.cache",
    "data.stage",
    "data.build",
    "engine.accumulation",
    "engine.offload.",
    "engine.zero.max_live_parameters",
    "engine.zero.max_reuse_distance",
    "engine.zero.overlap_comm",
    "engine.zero.param_persistence_threshold",
    "engine.zero.prefetch_bucket_size",
    "engine.zero.resident_gib",
    "engine.zero.sub_group_size",
    "model.activation_checkpointing",
    "model.deepembed.cache_rows",
    "model.deepembed.direct",
    "model.deepembed.io_threads",
    "model.deepembed.keep_output",
    "model.deepembed.nvme_path",
    "model.deepembed.threads",
    "model.deepembed.tier",
    "train.evaluate_",
    "train.stats_every",
    "train.sample_",
    "train.trace_",
)
"""Keys that a resumed run may change: they alter the losses by no more than rounding (rows on a
GPU are stepped by other kernels than those in host memory), and not what a checkpoint holds."""


def parser() -> jsonargparse.ArgumentParser:
    """Return the parser of every configuration key, with defaults, types and help."""
    p = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    p.add_argument("--config", action="config", help=jsonargparse.SUPPRESS)
    p.add_class_arguments(RunConfig)
    return p


def keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the configuration, sections included."""
    hints = {f.name: f for f in dataclasses.fields(cls)}
    for name, f in hints.items():
        yield prefix + name
        nested = _dataclass_of(cls, f.name)
        if nested is not None:
            yield from keys(nested, f"{prefix}{name}.")


@functools.cache
def _dataclass_of(cls: type, name: str) -> type | None:
    hint = typing.get_type_hints(cls)[name]
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _check_known(found: Sequence[str], where: str) -> None:
    known = list(keys())
    for key in found:
        if key not in known:
            leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            if found_near := leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5):
                hint = f"did you mean '{found_near[0]}'?"
            else:
                far = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                hint = (
                    f"none is like it, the nearest is '{far}'; `tiny-onn pretrain --help` has all"
                )
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}")


def _check_sections(found: Sequence[tuple[str, Any]], where: str) -> None:
    """Refuse anything but keys where a section stands.

    The parser would take a text there for the name of a class, and import its module to look.
    """
    sections = dict(_sections())
    for key, value in found:
        if key not in sections or (value is None and sections[key]):
            continue
        inner = next(k for k in keys() if k.startswith(f"{key}."))
        raise ConfigError(
            f"{where}: {key} is {_shown(value)}: expected keys, such as {inner.split('.')[-1]}, or "
            f"leave {key} out for what they are by default"
        )


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _sections(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the dotted key of every section, and whether it may be null."""
    for f in dataclasses.fields(cls):
        nested = _dataclass_of(cls, f.name)
        if nested is not None:
            hint = typing.get_type_hints(cls)[f.name]
            yield f"{prefix}{f.name}", type(None) in typing.get_args(hint)
            yield from _sections(nested, f"{prefix}{f.name}.")


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested plain values."""
    known = set(keys())
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(k.startswith(f"{key}.") for k in known):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigError naming file and line when it is not one."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        shipped = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*.yaml"))
        raise ConfigError(
            f"{path}: no such configuration; shipped in launcher/configs: {', '.join(shipped)}"
        ) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Check `--key value` and `--key=value` pairs; returns them as `--key=value`."""
    out: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"command line: expected --dotted.key value, found '{word}'")
        key, equals, value = word[2:].partition("=")
        _check_known([key], "command line")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: --{key} needs a value")
            value = rest.pop(0)
        if key in dict(_sections()):
            try:
                inner = yaml.safe_load(value)
            except yaml.YAMLError:
                inner = value
            pairs = list(flatten(inner, f"{key}.") if isinstance(inner, dict) else [(key, inner)])
            _check_known([k for k, _ in pairs], "command line")
            _check_sections(pairs, "command line")
        out.append(f"--{key}={value}")
    return out


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and dotted overrides into a RunConfig.

    Raises:
        ConfigError: unknown key (with the nearest right one), wrong type, unreadable file.
    """
    tree = read_yaml(path)
    _check_known([key for key, _ in flatten(tree)], str(path))
    _check_sections(list(flatten(tree)), str(path))
    arguments = _overrides(overrides)
    given = [word[2:].partition("=")[::2] for word in arguments]
    key = secret_in([*flatten(tree), *given])
    if key is not None:
        raise ConfigError(
            f"{path} and command line: {key} has credentials in a URL, which would be kept with "
            "the run; leave them out and give them in the environment (for s3:// addresses "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws)"
        )
    p = parser()
    try:
        namespace = p.instantiate(p.parse_args([f"--config={path}", *arguments]))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as e:
        where = f"{path} and command line" if arguments else str(path)
        raise ConfigError(f"{where}: {' '.join(str(e).split())}") from None
    values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(RunConfig)}
    cfg = RunConfig(**values)
    for key, value in flatten(plain(cfg)):
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, float) and math.isnan(n) for n in numbers):
            raise ConfigError(f"{path} and command line: {key} is not a number (nan); set one")
    return cfg


def validate(cfg: RunConfig) -> None:
    """Refuse what cannot be, beyond what `load` refuses: before a corpus is built or a rank starts.

    Raises:
        ConfigError: names the key and what it can be.
    """
    if not -(2**63) <= cfg.seed < 2**63 - 2**32:
        raise ConfigError(f"seed is {cfg.seed}: generators take 64 bits, set a smaller one")
    try:
        cfg.engine.validate(cfg.train.steps)
        cfg.checkpoint.validate()
        cfg.model.deepembed.validate("model.deepembed")
    except ValueError as e:
        raise ConfigError(str(e)) from None


def flat(cfg: RunConfig) -> dict[str, Any]:
    """Return {dotted key: plain value} of the whole configuration."""
    tree = yaml.safe_load(dump(cfg))
    return dict(flatten(tree))


def dump(cfg: RunConfig) -> str:
    """Return the configuration as YAML."""
    return yaml.safe_dump(plain(cfg), sort_keys=False)


def plain(cfg: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain values, for JSON and YAML."""
    tree: dict[str, Any] = _plain(dataclasses.asdict(cfg))
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def save(cfg: RunConfig, path: Path) -> None:
    """Write the resolved configuration atomically."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write(dump(cfg))
        f.flush()
        os.fsync(f.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(f.name, 0o666 & ~mask)
    os.replace(f.name, path)


def difference(saved: RunConfig, new: RunConfig) -> list[str]:
    """Return one line per key that a resumed run must not change but does."""
    before, after = flat(saved), flat(new)
    return [
        f"{key}: the run has {before.get(key)!r}, now asked for {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]
