"""`python -m kernels.modulate_bench`: tiles of the modulation's backward beside each other.

Zipf ids as text has them; a line per tile with the median of a launch in ms on the GPU, and the
least that its traffic takes at 3.0 TB/s.
"""

from __future__ import annotations

import itertools
import statistics

import torch

from kernels.modulate_triton import TILE, Tile, modulate_backward_triton
from kernels.rows import unique_index

TOKENS, WIDTH, ROWS = 8192, 2048, 20_000
TILES = (
    *((1, 512, 2), (1, 1024, 2), (1, 1024, 4), (1, 2048, 8)),
    *((2, 512, 2), (2, 1024, 4), (2, 2048, 8), (4, 512, 4), (16, 256, 4)),
)


def main() -> None:
    """Time every tile on one and the same batch."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    ids = (float(ROWS) ** u - 1).long()
    unique, index = unique_index(ids)
    device = torch.device("cuda")
    index = index.cut().to(device)
    x, grad = torch.randn(2, TOKENS, WIDTH, device=device).bfloat16()
    values = torch.randn(unique.shape[0], WIDTH, device=device).bfloat16()
    traffic = 2 * (3 * TOKENS + 2 * unique.shape[0]) * WIDTH
    print(f"{unique.shape[0]} rows; traffic {traffic / 3.0e9:.3f} ms; default {TILE}")
    found = []
    for tile in map(Tile._make, TILES):
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(41)
        ]
        for _ in range(3):
            modulate_backward_triton(grad, x, values, index, tile=tile)
        # The device must not wait for Python between two launches.
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        for event in events[:-1]:
            event.record()
            modulate_backward_triton(grad, x, values, index, tile=tile)
        events[-1].record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
        found.append((statistics.median(times), tile))
    for milliseconds, tile in sorted(found)[:12]:
        print(f"{milliseconds:.4f} ms  {tile}", flush=True)


if __name__ == "__main__":
    main()
