"""Configurations: typed, overridable, and wrong ones refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import config
from launcher.config import ConfigError

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
