"""Calibrated thresholds hit the target at any width."""

import pytest
import torch

from kernels.experts.router import cosine_scores, fire
from tiny_onn.router import calibrated_threshold, expected_fired


@pytest.mark.parametrize("width", [64, 256, 768, 2048])
@pytest.mark.parametrize(
    ("experts", "target", "bounds"),
    [(8, 2.0, (1, 4)), (16, 2.5, (1, 4)), (32, 4.0, (2, 8)), (64, 1.5, (1, 64))],
)
def test_expected_number_of_fired_experts_is_the_target_at_any_width(
    width, experts, target, bounds
):
    g = torch.Generator().manual_seed(width + experts)
    threshold = calibrated_threshold(experts, target, *bounds, width)
    # Tokens that share a strong common direction, as hidden states do: the expectation is over the
    # draw of the experts' directions, and must not mind.
    common = 2 * torch.randn(1, width, generator=g)
    counts, draws = [], 300
    for _ in range(draws):
        x = common + torch.randn(16, width, generator=g)
        s = cosine_scores(x, torch.randn(experts, width, generator=g))
        counts.append(fire(s - threshold, *bounds).sum(1).double().mean())
    mean = torch.stack(counts)
    error = mean.std() / draws**0.5
    assert abs(mean.mean() - target) < 4 * error + 0.005 * target


def test_calibration_accounts_for_the_bounds():
    assert expected_fired(0.25, 8, 0, 8) == pytest.approx(2.0)
    assert expected_fired(0.25, 8, 1, 8) > 2.0
    assert expected_fired(0.25, 8, 0, 3) < 2.0
