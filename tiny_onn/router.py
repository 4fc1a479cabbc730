"""Thresholds that let a fresh router fire the wanted number of experts, at any width."""

from __future__ import annotations

import math
from statistics import NormalDist


def expected_fired(probability: float, experts: int, min_experts: int, max_experts: int) -> float:
    """Mean of clip(Binomial(experts, probability), min_experts, max_experts)."""
    p = probability
    return sum(
        math.comb(experts, k)
        * p**k
        * (1 - p) ** (experts - k)
        * min(max(k, min_experts), max_experts)
        for k in range(experts + 1)
    )


def calibrated_threshold(
    experts: int, target: float, min_experts: int, max_experts: int, width: int
) -> float:
    """Cosine above which an expert must fire for `target` experts per token at initialisation.

    For directions drawn isotropically the cosines of one token with the E experts are independent,
    whatever the token, and t = s sqrt((C-1) / (1-s^2)) follows Student's t with C-1 degrees of
    freedom. First the firing probability is solved so that the *bounded* number of experts has the
    wanted mean, then its quantile is taken: normal, with the first two terms of the Cornish-Fisher
    expansion towards t (Abramowitz & Stegun 26.7.5), exact to 1e-3 from width 32 on.
    """
    low, high = 1e-4, 1 - 1e-4
    for _ in range(60):
        middle = (low + high) / 2
        if expected_fired(middle, experts, min_experts, max_experts) < target:
            low = middle
        else:
            high = middle
    z = NormalDist().inv_cdf(1 - (low + high) / 2)
    freedom = max(width - 1, 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / math.sqrt(freedom + t * t)
