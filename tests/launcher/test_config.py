"""Configurations: typed, overridable, and wrong ones refused by name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import config, pretrain
from launcher.config import ConfigError, RunConfig

CONFIGS = Path(config.__file__).parent / "configs"


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo", "125m", "1b", "7b"])
def test_a_shipped_configuration_loads_and_names_its_run(name: str) -> None:
    cfg = config.load(CONFIGS / f"{name}.yaml")
    assert cfg.name == name
    assert (CONFIGS / f"{name}.yaml").read_text().startswith(f"# {name}: ")


def test_dotted_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.yaml", "train: {steps: 7}\nmodel: {width: 96}\n")
    cfg = config.load(path, ["--train.steps", "9", "--engine.optimizer.lr=1e-3"])
    assert (cfg.train.steps, cfg.model.width, cfg.engine.optimizer.lr) == (9, 96, 1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {widht: 3}", "a.yaml: unknown key 'model.widht'; did you mean 'model.width'"),
        ("steps: 3", "unknown key 'steps'; did you mean 'train.steps'"),
        ("model: {width: wide}", "model.width"),
        ("model: {attention: {kind: dense}}", "kind"),
        ("model: {ffn: null}", "model.ffn is null: expected keys, such as kind, or leave"),
        ("model: 3", "model is 3: expected keys, such as vocab_size"),
        ("- 1", "expected a mapping"),
        ("model: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        config.load(_write(tmp_path / "a.yaml", text))
    assert message in str(e.value) and "a.yaml" in str(e.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.widht", "3"], "did you mean 'model.width'"),
        (["--foo", "1"], "unknown key 'foo'; none is like it, the nearest is '"),
        (["--model", "{widht: 3}"], "did you mean 'model.width'"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "many"], "train.steps"),
        (["steps", "3"], "expected --dotted.key value, found 'steps'"),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as e:
        config.load(_write(tmp_path / "a.yaml", "name: a"), words)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("model.loss_chunk=-5", "model.loss_chunk is -5: set it to 1 or more"),
        ("model.loss_chunk=0", "model.loss_chunk is 0: set it to 1 or more"),
        ("model.layers=0", "model.layers is 0: set it to 1 or more"),
        ("model.width=-4", "model.width is -4: set it to 1 or more"),
        ("model.vocab_size=-1", "model.vocab_size is -1: set it to 0 to take the corpus's"),
        ("model.norm_eps=0", "model.norm_eps is 0.0: set it above 0"),
        ("model.attention.rope_theta=.inf", "attention.rope_theta must be positive and finite"),
        ("model.ffn.router_temperature=0", "ffn.router_temperature must be above 0"),
        ("model.ffn.router_kl_weight=-1", "ffn.router_kl_weight must not be negative"),
        ("model.deepembed.io_threads=0", "model.deepembed: cache_rows 0 and threads 0 must be"),
        ("mesh.group=0", "mesh.group is 0: set it to 1 (no group) or more"),
        ("train.micro_batch=0", "train.micro_batch is 0: set it to 1 or more"),
        ("train.micro_batch=-1", "train.micro_batch is -1: set it to 1 or more"),
        ("train.global_batch=0", "train.global_batch is 0: set it to 1 or more"),
        ("train.global_batch=-8", "train.global_batch is -8: set it to 1 or more"),
        ("train.steps=0", "train.steps is 0: set it to 1 or more"),
        ("train.trace_steps=0", "train.trace_steps is 0: set it to 1 or more"),
        ("train.evaluate_every=-1", "train.evaluate_every is -1: set it to 0 for never, or to 1"),
        ("data.seq_len=1", "data.seq_len must be at least 2, got 1"),
        ("data.patience=-1", "data.patience must not be negative"),
        ("engine.schedule.warmup=999999", "engine.schedule.warmup 999999 must lie in 0 … 300"),
        ("engine.optimizer.eps=0", "engine.optimizer.eps 0.0 must be above 0"),
        ("engine.optimizer.lr=.inf", "engine.optimizer.lr inf must be finite"),
        ("engine.optimizer.lr=.nan", "engine.optimizer.lr is not a number (nan); set one"),
        ("engine.optimizer.betas=[.nan, 0.9]", "engine.optimizer.betas is not a number"),
        ("engine.zero.max_reuse_distance=-1", "engine.zero.max_reuse_distance -1 must not be"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last 0 must be at least 1"),
        ("seed=9223372036854775807", "seed is 9223372036854775807: generators take 64 bits"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, remedy: str
) -> None:
    def expensive(*_: object) -> None:
        raise AssertionError("a corpus was built")

    monkeypatch.setattr(pretrain, "prepare_corpus", expensive)
    path = _write(tmp_path / "a.yaml", f"name: a\nruns: {tmp_path}\nlaunch: {{processes: 1}}\n")
    with pytest.raises(ConfigError) as e:
        pretrain.main([str(path), f"--{word}"])
    assert remedy in str(e.value)


def _numbers(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield every dotted key that takes a number, and the class it belongs to."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kinds = (hints[f.name], *typing.get_args(hints[f.name]))
        for kind in kinds:
            if kind in (int, float):
                yield f"{prefix}{f.name}", cls
            elif dataclasses.is_dataclass(kind):
                yield from _numbers(kind, f"{prefix}{f.name}.")  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "cls"), dict(_numbers(RunConfig)).items())
def test_no_number_of_the_configuration_may_be_far_below_zero(key: str, cls: type) -> None:
    *sections, leaf = key.split(".")
    number: object = -(2**70)
    if typing.get_type_hints(cls)[leaf] is float:
        number = -(2.0**70)
    elif leaf == "betas":
        number = (-1.0, 0.9)
    with pytest.raises(ValueError, match=rf"\b{leaf}\b"):
        value: object = cls(**{leaf: number})
        # What its class does not refuse, `validate` does.
        cfg = RunConfig()
        for name in reversed(sections):
            parent = _section(cfg, sections[: sections.index(name)])
            value = dataclasses.replace(parent, **{name: value})  # type: ignore[type-var]
        assert isinstance(value, RunConfig)
        config.validate(value)


def _section(cfg: RunConfig, names: list[str]) -> object:
    part: object = cfg
    for name in names:
        part = getattr(part, name)
    return part


def test_a_run_may_go_on_with_other_activation_checkpoints() -> None:
    saved = config.load(CONFIGS / "demo.yaml")
    away = config.load(CONFIGS / "demo.yaml", ["--model.activation_checkpointing", "offload"])
    assert config.difference(saved, away) == []


def test_a_section_that_may_be_left_out_may_be_null(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.yaml", "data: {build: null}\nmodel: {}\n")
    assert config.load(path).data.build is None
    demo = config.load(CONFIGS / "demo.yaml", ["--data.build", "null"])
    assert demo.data.build is None
    words = ["--data.build", "{vocab_size: 600}", "--model", "{width: 64}"]
    cfg = config.load(path, words)
    assert cfg.data.build is not None
    assert (cfg.data.build.vocab_size, cfg.model.width) == (600, 64)


def test_a_missing_file_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"125m\.yaml.*demo\.yaml"):
        config.load(tmp_path / "none.yaml")


def test_what_is_saved_loads_as_the_same_configuration(tmp_path: Path) -> None:
    cfg = config.load(CONFIGS / "demo.yaml", ["--engine.optimizer.betas", "[0.8,0.9]"])
    config.save(cfg, tmp_path / "config.yaml")
    again = config.load(tmp_path / "config.yaml")
    assert config.flat(again) == config.flat(cfg)
    assert config.difference(cfg, again) == []


def test_only_keys_that_alter_losses_or_state_conflict() -> None:
    saved = config.load(CONFIGS / "demo.yaml")
    harmless = config.load(
        CONFIGS / "demo.yaml",
        ["--checkpoint.every", "7", "--train.evaluate_every", "3", "--launch.processes", "1"],
    )
    assert config.difference(saved, harmless) == []
    other = config.load(CONFIGS / "demo.yaml", ["--model.width", "64", "--train.steps", "3"])
    lines = config.difference(saved, other)
    assert [line.split(":")[0] for line in lines] == ["model.width", "train.steps"]
    assert "now asked for 64" in lines[0]
