"""A job is refused for good only for what trying again cannot mend."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from data import patient
from data.index import DataError, StoreAwayError
from launcher import pretrain
from launcher.config import ConfigError
from launcher.lifecycle import RunFolder
from tests.launcher.tiny import tiny_config
from tests.ports import closed_port


@pytest.mark.parametrize(
    ("address", "error", "refused"),
    [("s3://bucket/corpus", StoreAwayError, False), ("gopher://host/corpus", DataError, True)],
)
def test_a_store_that_is_away_at_the_start_may_be_tried_again_and_a_wrong_address_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    error: type[Exception],
    refused: bool,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("TINY_ONN_TRY", "job7-try0")
    monkeypatch.setattr(patient, "FIRST_PAUSE", 0.1)
    path = tiny_config(tmp_path, tmp_path / "corpus")
    words = ["--data.path", address, "--data.cache", str(tmp_path / "cache")]
    words += ["--data.patience", "0.3"]
    folder = RunFolder(pretrain.run_folder(path, words)).create()
    with closed_port() as port, pytest.raises(error, match=f"cannot fetch {address}/index"):
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        pretrain.main([str(path), *words])
    assert folder.refused.exists() == refused


@pytest.mark.parametrize("word", ["--model.widht=3", "--train.micro_batch=0", "--seed=.nan"])
def test_a_configuration_that_cannot_be_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("TINY_ONN_TRY", "job7-try0")
    path = tiny_config(tmp_path, tmp_path / "corpus")
    folder = RunFolder(tmp_path / "runs" / "tiny").create()
    with pytest.raises(ConfigError) as e:
        pretrain.main([str(path), word])
    assert folder.refused.read_text() == f"{e.value}\n"


def test_the_command_that_goes_on_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "prepare_corpus", lambda *_: None)
    monkeypatch.setattr(pretrain, "resolved", lambda cfg: cfg)
    monkeypatch.setattr(pretrain, "launch", lambda *_: 0)
    folder = tmp_path / "my runs"
    folder.mkdir()
    path = tiny_config(folder, tmp_path / "corpus")
    words = [str(path), "--train.sample_prompt", "a b", "--engine.optimizer.betas", "[0.8, 0.9]"]
    assert pretrain.main(words) == 0
    said = capsys.readouterr().out
    command = said.partition("the same command goes on: ")[2].strip()
    assert shlex.split(command) == ["bash", "slurm/pretrain.sh", *words]
