"""A corpus in an object store is read as one in a folder is, and bad objects are named."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data import patient
from data.index import DataError, StoreAwayError, read_index
from data.report import inspect, verify
from data.stored import fetch, open_corpus
from tests.data.conftest import Loaders, data_config
from tests.ports import closed_port

BUCKET = "corpora"


class Store:
    """An object store on loopback."""

    def __init__(self, endpoint: str) -> None:
        self.client: Any = boto3.client("s3", endpoint_url=endpoint)
        self.client.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path, name: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{name}/{path.relative_to(folder).as_posix()}"
                self.client.upload_file(str(path), BUCKET, key)
        return f"s3://{BUCKET}/{name}"

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=name)

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)


class Flaky:
    """A way to the store that can be cut, or answer with errors, for so many requests.

    `close` and `fill` cut it below HTTP, until `open`: connections are refused, or never made.
    """

    def __init__(self, endpoint: str, port: int) -> None:
        flaky = self
        self.mode = ""
        self.bad = 0
        self.held: list[socket.socket] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if flaky.bad == 0:
                    self._forward()
                    return
                flaky.bad -= 1
                if flaky.mode == "errors":
                    self.send_error(503)
                else:
                    self.connection.close()

            do_HEAD = do_GET

            def _forward(self) -> None:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                asked = Request(endpoint + self.path, headers=headers, method=self.command)
                try:
                    answer = urlopen(asked)
                except HTTPError as e:
                    answer = e
                with answer:
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        if name.lower() not in ("connection", "date", "server"):
                            self.send_header(name, value)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.wfile.write(answer.read())

            def log_message(self, format: str, *args: object) -> None:
                return

        self.handler, self.port = Handler, port
        self.open()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Serve, on the same port every time."""
        for s in self.held:
            s.close()
        self.held = []
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        self.server.shutdown()
        self.server.server_close()

    def fill(self) -> None:
        """Answer no attempt to connect: the queue of a socket that accepts nothing is full."""
        self.close()
        full = socket.create_server(("127.0.0.1", self.port), backlog=0)
        self.held.append(full)
        for _ in range(2):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(("127.0.0.1", self.port))
            self.held.append(s)


@pytest.fixture
def flaky(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    # The port is kept while no server has it.
    with closed_port() as port:
        flaky = Flaky(os.environ["S3_ENDPOINT_URL"], port)
        monkeypatch.setenv("S3_ENDPOINT_URL", flaky.endpoint)
        monkeypatch.setattr(patient, "FIRST_PAUSE", 0.2)
        yield flaky
        flaky.close()
        for s in flaky.held:
            s.close()


@pytest.mark.parametrize("mode", ["errors", "away"])
def test_a_store_that_fails_for_a_while_costs_only_time(
    store: Store, flaky: Flaky, corpus: Path, tmp_path: Path, open_loader: Loaders, mode: str
) -> None:
    address = store.upload(corpus, f"flaky-{mode}")
    local = open_loader(corpus)
    flaky.mode, flaky.bad = mode, 3
    remote = open_loader(address, cache=str(tmp_path / "cache"), patience=20)
    assert flaky.bad == 0
    flaky.bad = 3
    for _ in range(3):
        assert ids(remote.next_step()) == ids(local.next_step())
    assert flaky.bad == 0


@pytest.mark.parametrize("cut", [Flaky.close, Flaky.fill], ids=["refused", "dropped"])
def test_a_store_that_cannot_be_connected_to_for_a_while_costs_only_time(
    store: Store,
    flaky: Flaky,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[Flaky], None],
) -> None:
    store.put("connect/index.json", b"here")
    monkeypatch.setattr(patient, "CONNECT_TIMEOUT", 1.0)
    cut(flaky)
    back = threading.Timer(2.0, flaky.open)
    start = time.monotonic()
    back.start()
    fetch(f"s3://{BUCKET}/connect/index.json", tmp_path / "index.json", patience=30)
    assert (tmp_path / "index.json").read_bytes() == b"here"
    assert time.monotonic() - start > 2
    back.join()


@pytest.mark.parametrize("cut", [Flaky.close, Flaky.fill], ids=["refused", "dropped"])
def test_patience_bounds_the_wait_for_a_store_and_its_end_is_told_from_a_wrong_address(
    flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[[Flaky], None]
) -> None:
    monkeypatch.setattr(patient, "CONNECT_TIMEOUT", 1.0)
    cut(flaky)
    start = time.monotonic()
    with pytest.raises(StoreAwayError, match=r"cannot fetch .*data\.patience is 2 s"):
        fetch(f"s3://{BUCKET}/never", tmp_path / "never", patience=2)
    # An attempt, or a few, but not botocore's and boto3's on top of each.
    assert 2 <= time.monotonic() - start < 30
    if cut == Flaky.close:
        flaky.open()
        with pytest.raises(DataError) as wrong:
            fetch(f"s3://{BUCKET}/never", tmp_path / "never", patience=2)
        assert not isinstance(wrong.value, StoreAwayError)
        flaky.close()


def test_time_spent_waiting_for_another_reader_of_a_file_counts(flaky: Flaky) -> None:
    source = patient.downloader(f"s3://{BUCKET}/x", 60)
    flaky.close()
    start = time.monotonic()
    with (
        source.waiting_since(start - 60),
        pytest.raises(patient.TransientError, match="tried for 6"),
    ):
        source.download(f"s3://{BUCKET}/x", "/dev/shm/never")
    assert time.monotonic() - start < 30


def test_a_store_that_stays_away_stops_the_reading_and_is_named(
    store: Store, flaky: Flaky, corpus: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    address = store.upload(corpus, "gone")
    loader = open_loader(address, cache=str(tmp_path / "cache"), patience=1)
    flaky.mode, flaky.bad = "away", 10**9
    start = time.monotonic()
    # What is read ahead is no error before its turn comes.
    with pytest.raises(DataError, match=r"gone/train cannot be read: .*data\.patience is 1 s"):
        loader.next_step()
    assert 1 < time.monotonic() - start < 30
    with pytest.raises(DataError, match=r"cannot fetch .*data\.patience is 1 s"):
        open_loader(address, cache=str(tmp_path / "other"), patience=1)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        endpoint = f"http://127.0.0.1:{port}"
        assert host
        environment.setenv("S3_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield Store(endpoint)
    server.stop()


def ids(step: list[Any]) -> list[list[int]]:
    return [b.ids_T.tolist() for b in step]


@pytest.fixture(params=["plain", "zipped"])
def source(
    request: pytest.FixtureRequest, corpus: Path, texts: Path, tmp_path: Path
) -> tuple[Path, Path]:
    """A folder to upload, and one with the same samples to compare with."""
    if request.param == "plain":
        return corpus, corpus
    from data.build import build
    from tests.data.conftest import SEQ_LEN, recipe

    build(recipe(texts, compression="zstd"), tmp_path / "zipped", SEQ_LEN)
    return tmp_path / "zipped", corpus


def test_a_corpus_in_a_store_gives_the_same_batches_and_is_cached(
    store: Store, source: tuple[Path, Path], tmp_path: Path, open_loader: Loaders
) -> None:
    folder, same = source
    address = store.upload(folder, f"same-{folder.name}")
    cache = tmp_path / "cache"
    local, remote = open_loader(same), open_loader(address, cache=str(cache))
    assert remote.tokenizer.hash == local.tokenizer.hash
    for _ in range(5):
        assert ids(remote.next_step()) == ids(local.next_step())
    assert [ids([b]) for b in remote.evaluation_batches()] == [
        ids([b]) for b in local.evaluation_batches()
    ]
    shards = list(cache.glob("*/train/run0/*.mds"))
    assert shards and not list(cache.glob("*/train/run0/*.zstd"))
    resumed = open_loader(address, cache=str(tmp_path / "other"))
    resumed.load_state_dict(remote.state_dict())
    assert ids(resumed.next_step()) == ids(local.next_step())


def test_a_cached_shard_that_was_cut_short_is_fetched_again(
    store: Store, corpus: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    address = store.upload(corpus, "again")
    cache = tmp_path / "cache"
    identity = open_corpus(data_config(address, cache=str(cache))).index.identity
    folder = cache / f"{read_index(corpus).name}-{identity[:16]}" / "train" / "run0"
    shutil.copytree(corpus / "train", folder)
    for shard in folder.glob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-5])
    local, remote = open_loader(corpus), open_loader(address, cache=str(cache))
    for _ in range(5):
        assert ids(remote.next_step()) == ids(local.next_step())


def test_a_corpus_that_was_replaced_is_not_read_from_the_old_cache(
    store: Store, corpus: Path, texts: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    from data.build import build
    from tests.data.conftest import SEQ_LEN, recipe

    address = store.upload(corpus, "replaced")
    first = open_loader(address, cache=str(tmp_path / "cache"))
    state = first.state_dict()
    other = tmp_path / corpus.name
    build(recipe(texts, vocab_size=700), other, SEQ_LEN)
    store.upload(other, "replaced")
    second = open_loader(address, cache=str(tmp_path / "cache"))
    assert second.tokenizer.size == 700
    assert ids(second.next_step()) == ids(open_loader(other).next_step())
    with pytest.raises(DataError, match="data cursor has corpus"):
        second.load_state_dict(state)


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_bad_object_is_named_when_it_is_fetched(
    store: Store, corpus: Path, tmp_path: Path, open_loader: Loaders, damage: str
) -> None:
    address = store.upload(corpus, damage)
    for shard in (corpus / "train").glob("*.mds"):
        key = f"{damage}/train/{shard.name}"
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        if damage == "missing":
            store.delete(key)
        else:
            store.put(key, bytes(content[:-9] if damage == "short" else content))
    loader = open_loader(address, cache=str(tmp_path / "cache"))
    reason = (
        r"Object s3://corpora/missing/train/shard\.\d+\.mds not found"
        if damage == "missing"
        else r"Checksum failure: .*shard\.\d+\.mds"
    )
    with pytest.raises(DataError, match=reason):
        for _ in range(3):
            loader.next_step()
    # Another thread may just be fetching another shard, which it then removes.
    loader._samples._executor.shutdown(wait=True)
    assert not list((tmp_path / "cache").glob("*/train/run0/*.mds")), "a bad shard was kept"
    with pytest.raises(DataError, match=r"not found|is damaged"):
        verify(address, str(tmp_path / "cache"))


def test_a_wrong_address_is_refused_with_what_to_look_at(store: Store, tmp_path: Path) -> None:
    for address in ("s3://corpora/nothing", "s3://no-such-bucket/x"):
        config = data_config(address, cache=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=rf"cannot fetch {address}/index\.json: .*credentials"):
            open_corpus(config)
    with pytest.raises(DataError, match="cannot fetch gopher://x/index"):
        open_corpus(data_config("gopher://x", cache=str(tmp_path / "cache")))


def test_another_tokenizer_in_the_store_is_refused(
    store: Store, corpus: Path, texts: Path, tmp_path: Path
) -> None:
    from data.tokenizer import Tokenizer

    address = store.upload(corpus, "tokenizer")
    other = Tokenizer.train([p.read_text() for p in sorted(texts.rglob("*.py"))[:9]], 500)
    store.put("tokenizer/tokenizer.model", other.model)
    with pytest.raises(DataError, match="is not the tokenizer"):
        open_corpus(data_config(address, cache=str(tmp_path / "cache")))


def test_a_remote_corpus_can_be_inspected_and_verified(
    store: Store, corpus: Path, tmp_path: Path
) -> None:
    address = store.upload(corpus, "inspected")
    cache = str(tmp_path / "cache")
    report, local = inspect(address, cache=cache), inspect(str(corpus))
    assert {**report, "path": ""} == {**local, "path": ""}
    assert verify(address, cache) == verify(str(corpus))
