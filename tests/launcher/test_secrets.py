"""Loading runs no code, files follow the umask, and no secret reaches a log or configuration."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data import patient
from data.index import StoreAwayError
from data.stored import fetch
from data.tokenizer import Tokenizer
from launcher import __main__, config, worker
from launcher.lifecycle import LaunchConfig, RunError
from launcher.redact import guard_output, redact
from parallel.checkpoint import CheckpointError, CheckpointStore
from tests.launcher.tiny import finish, tiny_config, tiny_corpus, tiny_onn
from tests.parallel.checkpoints import ALONE, saved_alone
from tests.ports import closed_port
from tiny_onn.exported import ExportError, load_exported

CANARY = "canary-7f3a9c51d2"


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def recommit(folder: Path) -> None:
    """Make manifest and marker agree with the files, as a stranger who hands on a folder can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "COMMITTED").write_text(digest)


def test_pickle_in_any_place_of_a_checkpoint_or_export_is_never_run(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    saved_alone(tmp_path / "run", 1)
    folder = tmp_path / "run" / "step-00000001"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(whole) == {
        "COMMITTED",
        "manifest.json",
        "rank-00000.json",
        "rank-00000.dense.safetensors",
    }
    for name in ("rank-00000.dense.safetensors", "rank-00000.json"):
        (folder / name).write_bytes(bomb)
        recommit(folder)
        found = CheckpointStore(tmp_path / "run", ALONE).newest()
        assert found is not None
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            found.load("dense")
            _ = found.rank_meta
        for path, content in whole.items():
            (folder / path).write_bytes(content)
    # What the manifest does not name is not even looked at.
    for stray in ("rank-00000.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"):
        (folder / stray).write_bytes(bomb)
    found = CheckpointStore(tmp_path / "run", ALONE).newest()
    assert found is not None and len(found.load("dense")) == 4

    with pytest.raises((ValueError, RuntimeError, OSError)):
        (tmp_path / "tokenizer.model").write_bytes(bomb)
        Tokenizer.load(tmp_path / "tokenizer.model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(ExportError, match=name):
            load_exported(tmp_path)
        (tmp_path / "config.json").write_text(
            json.dumps({"format": 1, "model": {"vocab_size": 300, "width": 32, "layers": 1}})
        )
    assert not exploded.exists()


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the path that makes a file when it is imported."""
    exploded = tmp_path / "exploded"
    (tmp_path / "evilmod.py").write_text(f"open({str(exploded)!r}, 'w')\nclass X: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield exploded
    sys.modules.pop("evilmod", None)


CLASS = {"class_path": "evilmod.X"}


@pytest.mark.parametrize("value", ["evilmod.X", CLASS, [CLASS], None])
@pytest.mark.parametrize("key", ["model", "model.ffn", "data.build", "launch", "engine.optimizer"])
def test_a_strangers_configuration_imports_nothing(
    tmp_path: Path, evil: Path, key: str, value: Any
) -> None:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    file, plain = tmp_path / "c.yaml", tmp_path / "d.yaml"
    plain.write_text("name: x\n")
    dotted = {key: value}
    for arguments in (tree, dotted, [f"--{key}", json.dumps(value)], [f"--{key}={value}"]):
        if isinstance(arguments, dict):
            file.write_text(json.dumps(arguments))
        if value is None and key == "data.build" and arguments != ["--data.build=None"]:
            continue
        with pytest.raises(config.ConfigError, match=key.replace(".", r"\.")):
            if isinstance(arguments, dict):
                config.load(file)
            else:
                config.load(plain, arguments)
    assert not evil.exists()


@pytest.mark.parametrize("value", ["evilmod.X", CLASS, [CLASS], None])
@pytest.mark.parametrize("key", ["", "ffn", "attention", "deepembed"])
def test_a_strangers_export_imports_nothing(
    tmp_path: Path, evil: Path, key: str, value: Any
) -> None:
    model = {"vocab_size": 300, "width": 32, "layers": 1, key: value} if key else value
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": model}))
    with pytest.raises(ExportError, match=r"config\.json: .*model"):
        load_exported(tmp_path)
    assert not evil.exists()


def test_corpus_whose_columns_are_pickles_is_not_unpickled(tmp_path: Path) -> None:
    from streaming.base.format.mds.encodings import is_mds_encoding, mds_decode

    import data.streaming_shim  # noqa: F401

    assert not is_mds_encoding("pkl")
    with pytest.raises((KeyError, ValueError)):
        mds_decode("pkl", pickle.dumps(Bomb(tmp_path / "exploded")))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "path", [f"s3://me:{CANARY}@bucket/corpus", f"https://host/corpus?X-Amz-Signature={CANARY}"]
)
def test_credentials_in_a_configured_url_are_refused_without_being_repeated(
    path: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{path: '{path}'}}\n")
    other = tmp_path / "d.yaml"
    other.write_text("name: x\n")
    for arguments in ((file,), (other, ["--data.path", path])):
        with pytest.raises(config.ConfigError, match=r"data\.path has credentials") as raised:
            config.load(*arguments)
        assert CANARY not in str(raised.value)


def test_secrets_are_taken_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    text = (
        f"cannot reach http://me:pass@store:9000/x?a=1&X-Amz-Security-Token=abc end, key {CANARY}"
    )
    assert redact(text) == (
        "cannot reach http://***@store:9000/x?a=1&X-Amz-Security-Token=*** end, key ***"
    )
    assert redact("an@address and s3://bucket/a@b stay") == "an@address and s3://bucket/a@b stay"


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What a library's own handler writes; the process is as before afterwards."""
    make, hook = logging.getLogRecordFactory(), threading.excepthook
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logging.getLogger().addHandler(handler)
    yield out
    logging.getLogger().removeHandler(handler)
    logging.setLogRecordFactory(make)
    threading.excepthook = hook


def test_an_endpoint_with_credentials_does_not_reach_the_log_while_the_store_is_away(
    logged: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard_output()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(patient, "FIRST_PAUSE", 0.1)
    with closed_port() as port, pytest.raises(StoreAwayError):
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://user:{CANARY}@127.0.0.1:{port}")
        fetch("s3://bucket/index.json", tmp_path / "index.json", patience=0.3)
    assert "trying again" in logged.getvalue()
    assert "***@127.0.0.1" in logged.getvalue()
    assert CANARY not in logged.getvalue()


def test_every_process_that_logs_is_guarded(
    logged: io.StringIO, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def speak(argv: Any) -> int:
        try:
            raise ValueError(f"in http://me:{CANARY}@host/")
        except ValueError:
            logging.getLogger("x").exception("at %s", f"http://me:{CANARY}@host/")

        def die() -> None:
            raise ValueError(f"thread http://me:{CANARY}@host/")

        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
        return 0

    unguarded, hook = logging.getLogRecordFactory(), threading.excepthook
    monkeypatch.setattr(worker, "run", speak)
    monkeypatch.setattr("launcher.path_verb.main", speak)
    for main in (worker.main, __main__.main):
        logging.setLogRecordFactory(unguarded)
        threading.excepthook = hook
        assert main(["path"]) == 0
    text, said = logged.getvalue(), capfd.readouterr().err
    assert text.count("at http://***@host/") == text.count("ValueError: in http://***@host/") == 2
    assert said.count("ValueError: thread http://***@host/") == 2
    assert CANARY not in text + said


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY", "HF_TOKEN", "DB_PASSWD", "PGPASSWORD", "GH_PAT", "TLS_PRIVATE_KEY",
        "AWS_ACCESS_KEY_ID", "aws_secret_access_key", "REDIS_AUTH", "SMTP_PASS", "MYSQL_PWD",
    ],
)  # fmt: skip
def test_a_variable_that_is_a_secret_by_its_name_is_neither_kept_nor_shown(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=f"launch.environment has {name}: secrets are not kept"):
        LaunchConfig(environment={name: CANARY})
    monkeypatch.setenv(name, CANARY)
    assert redact(f"said {CANARY}") == "said ***"


def test_variables_that_are_no_secrets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "SSH_AUTH_SOCK")
    LaunchConfig(environment=dict.fromkeys(names, "/some/where"))
    for name in names:
        monkeypatch.setenv(name, "/some/where")
    assert redact("in /some/where") == "in /some/where"


@pytest.mark.slow
def test_run_folder_follows_the_umask_and_holds_no_secret_of_the_environment(
    tmp_path: Path,
) -> None:
    corpus = tiny_corpus(tmp_path / "corpus")
    secrets = {
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "AWS_ACCESS_KEY_ID": CANARY,
        "HF_TOKEN": CANARY,
        "S3_ENDPOINT_URL": f"http://user:{CANARY}@127.0.0.1:9",
    }
    before = os.umask(0o027)
    try:
        folder = tmp_path / "open"
        folder.mkdir()
        path = tiny_config(folder, corpus)
        words = ["--launch.processes", "1", "--train.steps", "4", "--train.sample_every", "2"]
        code, output = finish(tiny_onn("pretrain", path, *words, **secrets))
        assert code == 0, output
        # One that fails, at an address of which the endpoint's credentials are a part.
        cache = ["--data.cache", str(tmp_path / "cache"), "--name", "failed"]
        cache += ["--data.patience", "2"]
        bad = finish(tiny_onn("pretrain", path, "--data.path", "s3://b/c", *cache, **secrets))
        assert bad[0] == 1 and "cannot fetch s3://b/c" in bad[1], bad[1]
        assert "trying again" in bad[1]
    finally:
        os.umask(before)
    assert CANARY not in output + bad[1]
    files = [p for p in (folder / "runs").rglob("*")]
    assert len(files) > 15
    for file in files:
        assert file.stat().st_mode & 0o007 == 0, file
        if file.is_file():
            assert file.stat().st_mode & 0o040, file
            assert CANARY.encode() not in file.read_bytes(), file
            assert file.suffix not in (".pt", ".pkl", ".pickle", ".bin"), file
