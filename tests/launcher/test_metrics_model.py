"""Statistics of the model: recorded when asked, reduced over ranks, named by group and layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.model_stats import (
    collect,
    derive,
    predictive_integrity,
    recording,
    scalars,
    tag,
    vectors,
)
from parallel.mesh import Mesh
from tests.ranks import RankError, run_ranks


class Keeper(nn.Module):
    """Records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.record = False
        self.stats: dict[str, Tensor] = {}

    def forward(self, values: dict[str, Tensor]) -> None:
        if self.record:
            self.stats = values


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Keeper()
        self.ffn = Keeper()


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))


def test_nothing_is_recorded_outside_a_recorded_step() -> None:
    model = Model()
    with recording(model, active=False) as stats:
        model.blocks[0].ffn({"surprise": torch.tensor(1.0)})
    assert stats == {}
    with recording(model) as stats:
        model.blocks[0].ffn({"surprise": torch.tensor(2.0)})
        assert stats == {}, "statistics are gathered when the step is over"
    assert stats["blocks.0.ffn"]["surprise"] == 2.0
    model.blocks[0].ffn({"surprise": torch.tensor(3.0)})
    assert collect(model)["blocks.0.ffn"]["surprise"] == 2.0


def test_recording_ends_when_the_step_fails() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="step"), recording(model):
        raise RuntimeError("step")
    assert not model.blocks[1].ffn.record


def test_a_matrix_is_refused_by_module_and_name() -> None:
    model = Model()
    with (
        pytest.raises(ValueError, match=r"'scores' of module 'blocks.1.ffn' has shape \[2, 3\]"),
        recording(model),
    ):
        model.blocks[1].ffn({"scores": torch.zeros(2, 3)})


def _collect_on(mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    model = Model(1)
    collectives = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (collectives.append(1), real(*a, **k))
    for _ in range(2):
        with recording(model) as stats:
            model.blocks[0].ffn(
                {
                    "mean": torch.tensor(float(mesh.rank)),
                    "some_counts": torch.tensor([1, 2 + mesh.rank]),
                    "surprise_E": torch.tensor([math.nan, 4.0 if mesh.rank else math.nan, 2.0]),
                }
            )
    assert len(collectives) == 2, "one collective for a recorded step"
    return stats


def test_ranks_are_averaged_or_summed_and_the_unknown_is_left_out() -> None:
    for stats in run_ranks(_collect_on, 2):
        found = stats["blocks.0.ffn"]
        assert found["mean"] == 0.5
        assert found["some_counts"].tolist() == [2.0, 5.0]
        assert found["surprise_E"].isnan().tolist() == [True, False, False]
        assert found["surprise_E"][1:].tolist() == [4.0, 2.0]


def _disagree(mesh: Mesh) -> Any:
    model = Model(1)
    with recording(model):
        model.blocks[0].ffn({f"of_rank_{mesh.rank}": torch.tensor(1.0)})


def test_ranks_that_keep_different_things_are_told_instead_of_hanging() -> None:
    with pytest.raises(RankError, match=r"ranks 0 and 1 keep different statistics.*of_rank_"):
        run_ranks(_disagree, 2)


def test_tags_name_group_layer_and_statistic() -> None:
    assert tag("blocks.3.ffn", "surprise") == "moe/layer_03/surprise"
    assert tag("blocks.12.attention", "gate_window") == "nsa/layer_12/gate_window"
    assert tag("head", "entropy") == "head/entropy"


def test_what_follows_from_the_load_does_not_replace_what_the_module_says() -> None:
    load = torch.tensor([1.0, 1.0, 0.0, 2.0])
    stats = {
        "blocks.0.ffn": {"expert_load": load},
        "blocks.1.ffn": {"expert_load": load.clone(), "dead_experts": torch.tensor(3.0)},
        "blocks.2.ffn": {"expert_load": torch.zeros(4)},
    }
    derive(stats)
    assert stats["blocks.0.ffn"]["dead_experts"] == 1
    assert stats["blocks.0.ffn"]["load_max"] == 2.0
    assert stats["blocks.1.ffn"]["dead_experts"] == 3
    assert set(stats["blocks.2.ffn"]) == {"expert_load"}
    overall = scalars(stats)
    assert overall["moe/dead_experts"] == 4.0 and overall["moe/load_max"] == 2.0
    assert vectors(stats)["moe/expert_load"].shape == (12,)


def test_predictive_integrity_falls_with_loss_and_surprise() -> None:
    terms = predictive_integrity(2.0, 4.0, 0.5, alpha=2.0, gamma=0.25, eps=0.0)
    assert terms["value"] == pytest.approx(math.exp(-2.0 * (0.75 * 0.5 + 0.25 * 0.5)))
    assert (
        predictive_integrity(2.5, 4.0, 0.5)["value"] < predictive_integrity(2.0, 4.0, 0.5)["value"]
    )
    assert (
        predictive_integrity(2.0, 4.0, 0.9)["value"] < predictive_integrity(2.0, 4.0, 0.5)["value"]
    )
