"""Row kernels: gathers equal indexing, sums keep a fixed order, layers share one gradient."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kernels.modulate import modulate
from kernels.rows import (
    PIECE,
    RowIndex,
    gather_rows,
    row_index,
    segment_sum,
    split_layers,
    unique_ids,
    unique_index,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def zipf_ids(tokens: int, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return (float(rows) ** u - 1).long().clamp(0, rows - 1)


def test_unique_ids_are_sorted_and_invertible():
    ids = torch.tensor([7, 2, 7, 0, 2, 9])
    unique, inverse = unique_ids(ids)
    assert unique.tolist() == [0, 2, 7, 9]
    assert torch.equal(unique[inverse], ids)


@pytest.mark.parametrize("tokens", [0, 1, 500])
def test_one_sort_gives_unique_ids_and_index(tokens):
    ids = zipf_ids(tokens, 90)
    unique, inverse = unique_ids(ids)
    ours, index = unique_index(ids)
    assert torch.equal(ours, unique)
    for a, b in zip(index[:3], row_index(inverse, unique.shape[0])[:3], strict=True):
        assert torch.equal(a, b)


def test_row_index_keeps_token_order_within_a_row():
    index = row_index(torch.tensor([2, 0, 2, 0, 2]), 4)
    assert index.order_T.tolist() == [1, 3, 0, 2, 4]
    assert index.starts_U1.tolist() == [0, 2, 2, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 1, 1), (3, 5, 7), (257, 40, 33)])
def test_segment_sum_equals_the_oracle(tokens, rows, width, dtype):
    inverse = zipf_ids(tokens, rows)
    index = row_index(inverse, rows)
    grad = torch.randn(tokens, width).to(dtype)
    for out in (dtype, torch.float32):
        oracle = segment_sum(grad, index, dtype=out, implementation="naive")
        tolerance = 2e-2 if out == torch.bfloat16 else 1e-5
        got = segment_sum(grad, index, dtype=out)
        assert got.dtype == out
        torch.testing.assert_close(got, oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (0, 3), (1, 1), (PIECE, 1), (500, 40)])
def test_pieces_cover_every_row_in_order(tokens, rows):
    index = row_index(zipf_ids(tokens, rows) if rows else torch.empty(0, dtype=torch.int64), rows)
    pieces, longs, slots = index.cut().pieces
    found: dict[int, list[list[int]]] = {row: [] for row in range(rows)}
    for row, start, stop, slot in pieces.tolist():
        assert stop - start <= PIECE
        found[row].append([start, stop, slot])
    several = []
    for row, parts in found.items():
        assert parts[0][0] == index.starts_U1[row]
        assert parts[-1][1] == index.starts_U1[row + 1]
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        if len(parts) > 1:
            several.append([row, parts[0][2], len(parts)])
        else:
            assert parts[0][2] == -1
    assert longs.tolist() == several
    used = [part[2] for parts in found.values() for part in parts if part[2] >= 0]
    assert used == list(range(slots))


def test_segment_sum_without_tokens_is_zero():
    index = row_index(torch.empty(0, dtype=torch.int64), 3)
    assert torch.equal(segment_sum(torch.empty(0, 4), index), torch.zeros(3, 4))


def test_segment_sum_repeats_bitwise_whatever_the_number_of_threads():
    inverse = zipf_ids(4096, 300)
    grad = torch.randn(4096, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(segment_sum(grad, row_index(inverse, 300)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_segment_sum_refuses_an_index_of_another_batch_and_unknown_kernels():
    index = row_index(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="2 tokens"):
        segment_sum(torch.zeros(3, 4), index)
    with pytest.raises(ValueError, match="none of"):
        segment_sum(torch.zeros(2, 4), index, implementation="fast")


def test_gather_rows_gradients_are_exact():
    inverse = torch.tensor([2, 0, 2, 1, 2])
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = row_index(inverse, 4)
    assert torch.autograd.gradcheck(lambda v: gather_rows(v, index), (values,))
    assert torch.equal(gather_rows(values, inverse), values[inverse])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_one_row_get_the_gradients_of_plain_slices(checkpointing):
    layers, width, tokens = 3, 5, 64
    ids = zipf_ids(tokens, 20)
    unique, inverse = unique_ids(ids)
    rows = torch.randn(len(unique), layers * width)
    x = torch.randn(tokens, width)

    def loss_of(part, index):
        return (gather_rows(part, index) * x).tanh().sum()

    ours = rows.clone().requires_grad_()
    index = row_index(inverse, len(unique))
    total = torch.zeros(())
    for part in split_layers(ours, layers):
        if checkpointing:
            total = total + torch.utils.checkpoint.checkpoint(
                loss_of, part, index, use_reentrant=False
            )
        else:
            total = total + loss_of(part, index)
    total.backward()
    plain = rows.clone().requires_grad_()
    sum(
        (plain[:, i * width : (i + 1) * width][inverse] * x).tanh().sum() for i in range(layers)
    ).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_split_layers_copies_nothing_and_refuses_uneven_widths():
    values = torch.randn(4, 6)
    assert all(part.data_ptr() - values.data_ptr() < 24 for part in split_layers(values, 3))
    with pytest.raises(ValueError, match="6 columns"):
        split_layers(values, 4)


def modulate_case(device="cpu", dtype=torch.float64, tokens=40, rows=9, width=33):
    inverse = zipf_ids(tokens, rows)
    generator = torch.Generator().manual_seed(1)
    x, residual, grad = (torch.randn(tokens, width, generator=generator) for _ in range(3))
    # One layer's columns of wider rows.
    values = torch.randn(rows, 2 * width, generator=generator)[:, width:]
    index = row_index(inverse, rows)
    tensors = [t.to(device, dtype).requires_grad_() for t in (x, values, residual)]
    return tensors, grad.to(device, dtype), index.to(torch.device(device))


def modulate_oracle(x, values, residual, grad, index):
    doubles = [t.detach().double().requires_grad_() for t in (x, values, residual)]
    out = doubles[2] + doubles[0] * (1 + doubles[1][index.inverse_T])
    return out.detach(), *torch.autograd.grad(out, doubles, grad.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modulate_equals_the_oracle(dtype):
    tensors, grad, index = modulate_case(dtype=dtype)
    out = modulate(*tensors[:2], index, tensors[2])
    ours = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    tolerance = 1e-6 if dtype == torch.float64 else 3e-2
    for a, b in zip(ours, modulate_oracle(*tensors, grad, index), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert torch.equal(modulate(*tensors[:2], index.inverse_T), modulate(*tensors[:2], index))


def test_row_index_moves_as_a_whole():
    index = row_index(torch.tensor([1, 0]), 2).to(torch.device("cpu"))
    assert isinstance(index, RowIndex)


def test_triton_segment_sum_equals_the_oracle_in_the_interpreter():
    pytest.importorskip("triton")
    code = """
import torch
from kernels.rows import row_index, segment_sum
for tokens, rows, width in ((1, 1, 1), (40, 7, 33), (50, 3, 300), (70, 2, 5), (0, 3, 4)):
    inverse = torch.randint(0, rows, (tokens,)) // 2 * 2 % rows
    grad = torch.randn(tokens, width)
    index = row_index(inverse, rows)
    torch.testing.assert_close(
        segment_sum(grad, index, implementation="triton"),
        segment_sum(grad, index, implementation="naive"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        segment_sum(grad.t().contiguous().t(), index, implementation="triton"),
        segment_sum(grad, index, implementation="naive"), rtol=1e-5, atol=1e-5)
    from kernels.modulate_triton import modulate_backward_triton, modulate_triton
    x, residual = torch.randn(2, tokens, width)
    values = torch.randn(rows, 3 * width)[:, width : 2 * width]
    chosen = values[inverse]
    torch.testing.assert_close(
        modulate_triton(x, values, inverse, residual), residual + x * (1 + chosen))
    torch.testing.assert_close(modulate_triton(x, values, inverse, None), x * (1 + chosen))
    expected = segment_sum(grad * x, index, implementation="naive")
    for over in (False, True):
        rows_UW = values.contiguous() if over else values
        dx, dvalues = modulate_backward_triton(grad, x, rows_UW, index, over_values=over)
        assert (dvalues is rows_UW) == over
        torch.testing.assert_close(dx, grad * (1 + chosen))
        torch.testing.assert_close(dvalues, expected, rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=REPOSITORY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_segment_sum_equals_the_oracle_on_the_gpu(dtype):
    inverse = zipf_ids(2048, 300)
    grad = torch.randn(2048, 520).to(dtype)
    index = row_index(inverse, 300)
    oracle = segment_sum(grad, index, dtype=torch.float32, implementation="naive")
    device = torch.device("cuda")
    got = segment_sum(grad.to(device), index.to(device), dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), oracle, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, segment_sum(grad.to(device), index.to(device), dtype=torch.float32))


def test_sink_gets_the_gradient_in_place_of_autograd():
    (x, values, residual), grad, index = modulate_case()
    expected = torch.autograd.grad(modulate(x, values, index, residual), (x, values), grad)
    rows, taken = values.detach().clone().requires_grad_(), []

    def layer(x, residual):
        return modulate(x, rows, index, residual, taken.append)

    out = torch.utils.checkpoint.checkpoint(layer, x, residual, use_reentrant=False)
    dx, dresidual = torch.autograd.grad(out, (x, residual), grad)
    assert torch.equal(dx, expected[0]) and torch.equal(dresidual, grad)
    assert len(taken) == 1 and torch.equal(taken[0], expected[1])
    # It took the rows' own memory.
    assert taken[0].data_ptr() == rows.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulate_equals_the_oracle_on_the_gpu_and_repeats_bitwise(dtype):
    tensors, grad, index = modulate_case("cuda", dtype, 2048, 300, 520)
    results = []
    for _ in range(2):
        out = modulate(*tensors[:2], index, tensors[2])
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, again, b in zip(*results, modulate_oracle(*tensors, grad, index), strict=True):
        assert torch.equal(a, again)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * 5)
    # Cut on the host, as a table's plan does, and written over the rows: the same bits.
    x, values, residual = tensors
    cut = RowIndex(*(t.cpu() for t in index[:3])).cut().to(index.inverse_T.device)
    rows, taken = values.detach().contiguous().requires_grad_(), []
    out = modulate(x, rows, cut, residual, taken.append)
    (dx,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(dx, results[0][1]) and torch.equal(taken[0], results[0][2])
    assert taken[0].data_ptr() == rows.data_ptr()
