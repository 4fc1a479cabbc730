"""The pre-flight blames the node that is at fault, and only that one."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher import config, preflight
from launcher.lifecycle import LaunchConfig, RunError
from launcher.preflight import Report, check_folder, check_network
from launcher.preflight_judge import find_faults
from launcher.ranks import Rendezvous
from tests.launcher.tiny import CONFIG

NAMES = ["a", "b", "c", "d"]


def reports(nodes: int = 4, links: bool = True) -> list[dict[str, Any]]:
    """What fit nodes report, as it comes back from JSON."""
    out = []
    for node in range(nodes):
        report = Report(node, NAMES[node], doing="", versions={"torch": "2.11", "driver": "570"})
        fields = asdict(report) | {"peers": {str(n): "" for n in range(nodes)}, "links": {}}
        if links:
            peers = {(node - 1) % nodes, (node + 1) % nodes}
            fields["links"] = {str(p): "" for p in peers}
        out.append(fields)
    return out


def test_fit_nodes_have_no_fault() -> None:
    assert find_faults(NAMES, list(reports())) == ({}, [])


def test_folder_of_the_nvme_tier_is_probed_where_a_table_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(runs="runs", corpus="corpus"))
    nvme = ["--model.deepembed.tier", "nvme", "--model.deepembed.nvme_path", str(tmp_path)]
    off = ["--model.deepembed.kind", "off"]
    embedding = ["--model.embedding_partition", "rows", "--model.tie_embeddings", "false"]
    for words, folders in (
        (nvme, [tmp_path]),
        ([*nvme, *off], []),
        ([*nvme, *off, *embedding], [tmp_path]),
        ([*nvme, "--model.deepembed.partition", "zero3"], []),
    ):
        assert preflight.scratch_folders(config.load(path, words)) == folders, words


@pytest.mark.parametrize("node", [0, 2])
def test_the_node_that_differs_from_the_majority_is_named(node: int) -> None:
    found = reports()
    found[node]["versions"]["driver"] = "535"
    faults, general = find_faults(NAMES, found)
    assert faults == {NAMES[node]: ["driver is 535, on the others 570"]}
    assert not general


def test_a_node_that_left_nothing_or_hung_is_named() -> None:
    found: list[dict[str, Any] | None] = list(reports())
    found[1] = None
    hung = found[3]
    assert hung is not None
    hung["doing"] = "2 GPU(s)"
    faults, _ = find_faults(NAMES, found)
    assert set(faults) == {"b", "d"}
    assert "2 GPU(s)" in faults["d"][0]


def test_the_node_whose_every_link_fails_is_named_and_its_neighbours_are_not() -> None:
    found = reports()
    for peer in ("1", "3"):
        found[2]["links"][peer] = "nccl: timeout"
        found[int(peer)]["links"]["2"] = "nccl: timeout"
    faults, general = find_faults(NAMES, found)
    assert list(faults) == ["c"]
    assert "all-reduce with node b failed: nccl: timeout" in faults["c"][0]
    assert not general


def test_a_failed_link_between_two_good_nodes_is_nobodys_fault() -> None:
    found = reports()
    found[0]["links"]["1"] = "gloo: timeout"
    faults, general = find_faults(NAMES, found)
    assert not faults
    assert general == ["all-reduce between a and b failed: gloo: timeout"]


def test_of_two_nodes_that_do_not_reach_each_other_the_second_is_replaced() -> None:
    found = reports(2)
    found[1]["links"]["0"] = "gloo: timeout"
    assert list(find_faults(NAMES[:2], found)[0]) == ["b"]


def test_the_first_node_is_blamed_when_no_other_reaches_it() -> None:
    found = reports(3)
    for report in found[1:]:
        report.update(network="cannot reach node 0", peers={"0": "cannot reach node 0"}, links={})
    found[0].update(peers={"1": "missing", "2": "missing"}, links={})
    assert list(find_faults(NAMES[:3], found)[0]) == ["a"]
    found = reports(3)
    found[2].update(network="cannot reach node 0", peers={"0": "cannot reach node 0"}, links={})
    found[0]["peers"]["2"] = found[1]["peers"]["2"] = "did not come to the network check"
    assert list(find_faults(NAMES[:3], found)[0]) == ["c"]


def meet(nodes: int, absent: frozenset[int] = frozenset()) -> list[Report]:
    """Run the network check of several nodes as threads."""
    address = socket.gethostbyname("localhost")
    found = [Report(node, NAMES[node], doing="") for node in range(nodes)]

    def one(node: int) -> None:
        check_network(replace(place, node=node), found[node], ["gloo"])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(nodes) if n not in absent]
    with Rendezvous(nodes, 0, address, 0).held() as place:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    return found


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_every_node_all_reduces_with_its_neighbours_and_with_all(nodes: int) -> None:
    for report in meet(nodes):
        assert set(report.peers.values()) == {""}
        assert report.gigabytes_per_s["gloo"] > 0
        assert set(report.links.values()) == {""}
        ends = nodes == 2 or (nodes == 3 and report.node != 1)
        assert len(report.links) == (1 if ends else 2)
        assert report.network == ""


def test_a_node_that_does_not_come_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PEERS_SECONDS", 5.0)
    found = meet(3, absent=frozenset({2}))
    for report in found[:2]:
        assert report.peers == {0: "", 1: "", 2: "did not come to the network check"}
        assert report.links == {1 - report.node: ""}


def test_what_comes_while_the_one_that_waits_is_held_up_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    come: list[bool] = []
    moments = itertools.chain([0.0], itertools.repeat(99.0))

    def held_up_before_it_returns() -> float:
        now = next(moments)
        if now:
            come.append(True)
        return now

    monkeypatch.setattr("launcher.preflight.time.monotonic", held_up_before_it_returns)
    looks: list[bool] = []
    preflight._wait_for(lambda: bool(looks.append(bool(come)) or come), 10.0)
    assert looks[-1]


def test_a_folder_that_is_full_or_missing_is_a_problem(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "new", 0.001) == []
    assert "are needed (launch.free_gb" in check_folder(tmp_path, 1e9)[0]
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in check_folder(tmp_path / "file" / "x", 0)[0]


def test_the_environment_of_the_ranks_has_no_secrets_and_no_places() -> None:
    assert LaunchConfig(environment={"NCCL_DEBUG": "WARN", "NCCL_IB_TIMEOUT": 22}).environment
    with pytest.raises(RunError, match="secrets are not kept"):
        LaunchConfig(environment={"AWS_SECRET_ACCESS_KEY": "x"})
    with pytest.raises(RunError, match="MASTER_PORT, which the launcher sets"):
        LaunchConfig(environment={"MASTER_PORT": 1})


def gpu_node(node: int, port: int, path: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(node)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    report = Report(node, NAMES[node], doing="")
    place = Rendezvous(2, node, "127.0.0.1", port)
    check_network(place, report, ["gloo", "nccl"])
    Path(path).write_text(json.dumps(asdict(report)))


@pytest.mark.gpu
def test_two_gpus_all_reduce_over_nccl(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spawn = multiprocessing.get_context("spawn")
    paths = [tmp_path / f"{node}.json" for node in (0, 1)]
    with Rendezvous(2, 0, "127.0.0.1", 0).held() as place:
        words = [(n, place.port, str(paths[n])) for n in (0, 1)]
        nodes = [spawn.Process(target=gpu_node, args=w) for w in words]
        for process in nodes:
            process.start()
        for process in nodes:
            process.join(120)
            assert process.exitcode == 0
    for path in paths:
        report = json.loads(path.read_text())
        assert set(report["links"].values()) == {""}
        assert report["gigabytes_per_s"]["nccl"] > 0
        print(report["gigabytes_per_s"])


@pytest.mark.gpu
def test_a_gpu_that_answers_is_named_and_one_too_many_is_a_problem() -> None:
    import torch

    count = torch.cuda.device_count()
    names, problems = preflight.check_gpus(count)
    assert (len(names), problems) == (count, [])
    names, problems = preflight.check_gpus(count + 1)
    assert f"GPU {count} does not answer" in problems[0]
