"""The compiled row kernels equal the torch ones, repeat bitwise, and say what they lack."""

import pytest
import torch

from kernels import rows_host
from kernels.rows_host import RowKernelError, row_kernels
from kernels.rows_step import KINDS, Counter, Fields, Rule, Transport, tick

SLOTS, WIDTH, ROWS = 50, 37, 20


def everything(kernels, kind, dtype):
    """Gather, add and step some rows; return all that was written."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # Two layers of a row, between columns of something else.
    whole = [normal(SLOTS, 4 * WIDTH), normal(SLOTS, 4 * WIDTH), normal(SLOTS, 4 * WIDTH).square()]
    columns = slice(WIDTH, 3 * WIDTH)
    narrow = slice(1, 3)
    second = whole[2][:, columns if kind == "adam" else narrow]
    fields = Fields(whole[0][:, columns], whole[1][:, columns], second)
    if kind == "adagrad_rowwise":
        fields = fields._replace(first_SW=fields.weight_SW)
    steps = torch.randint(0, 5, (SLOTS, 1), generator=generator).float()
    slots = torch.randperm(SLOTS, generator=generator)[:ROWS]
    # As they come from other ranks: the layers of a row side by side.
    grads = list(normal(ROWS, 2, WIDTH).to(dtype).unbind(1))
    places = torch.where(torch.rand(ROWS, generator=generator) > 0.5, torch.arange(ROWS), -1)
    rule = Rule(kind, (0.9, 0.95), 1e-8, 0.1, 0.01, 0.7)
    clock = tick(rule, steps, slots)
    fresh, gathered = torch.zeros(2, 2, ROWS, WIDTH, dtype=dtype)
    ready = Counter(0)
    order = torch.randperm(ROWS, generator=generator)
    kernels.step(rule, slots, fields, clock, grads, Transport(fresh, places), ready)
    assert ready.value == 2
    kernels.step(rule, slots, fields, clock, [grad.flip(0).contiguous() for grad in grads], None)
    total, squares = normal(SLOTS, WIDTH), torch.zeros(SLOTS)
    kernels.add(total, slots, torch.arange(ROWS) % 2 == 0, grads[0], squares)
    ready.value = 0
    kernels.gather(fields.weight_SW, slots, gathered, order, ready)
    assert ready.value == 2
    kernels.gather(fields.weight_SW, slots[:3], fresh[:, :3].contiguous())
    return [*whole, steps, fresh, gathered, total, squares]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_torch(kind, dtype):
    compiled = everything(row_kernels("compiled", 2), kind, dtype)
    for ours, plain in zip(compiled, everything(row_kernels("torch", 1), kind, dtype), strict=True):
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance / 10)


def test_compiled_repeats_bitwise_whatever_the_threads():
    results = [
        everything(row_kernels("compiled", n), "adam_rowwise", torch.float32) for n in (1, 3)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checksums_are_the_same_words():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**62), 2**62, (9, 70), generator=generator) * 2
    factors = torch.randint(-(2**62), 2**62, (70,), generator=generator) * 2 + 1
    places = torch.tensor([8, 0, 3])
    sums = [row_kernels(name, 2).checksum(words, places, factors) for name in ("compiled", "torch")]
    assert torch.equal(*sums)
    words[3, 69] += 1
    assert torch.equal(row_kernels("compiled", 1).checksum(words, places, factors), sums[0])
    words[3, 68] += 1
    changed = row_kernels("compiled", 1).checksum(words, places, factors) != sums[0]
    assert changed.tolist() == [False, False, True]


def test_bf16_is_rounded_as_torch_rounds():
    numbers = torch.cat(
        [torch.randn(4096), torch.tensor([float("nan"), float("inf"), -0.0, 1.00390625, 3.4e38])]
    )
    out_LPw = torch.zeros(1, 1, numbers.shape[0], dtype=torch.bfloat16)
    row_kernels("compiled", 1).gather(numbers[None], torch.zeros(1, dtype=torch.int64), out_LPw)
    out = out_LPw[0]
    assert torch.equal(out[0].isnan(), numbers.isnan())
    assert torch.equal(out[0][:-5], numbers.bfloat16()[:-5])
    assert torch.equal(out[0][-4:], numbers.bfloat16()[-4:])


def test_memory_the_kernels_cannot_take_is_refused():
    kernels, slots = row_kernels("compiled", 1), torch.arange(2)
    with pytest.raises(ValueError, match="adjacent columns"):
        kernels.gather(torch.zeros(4, 6)[:, ::2], slots, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="float16"):
        kernels.gather(torch.zeros(4, 6), slots, torch.zeros(1, 2, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="none of compiled, torch"):
        row_kernels("cuda", 1)


@pytest.mark.parametrize("compiler", ["/does/not/exist", "false"])
def test_machine_without_a_compiler_is_told_what_to_do(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RowKernelError, match=r"install a C\+\+ compiler.*kernel: torch"):
        rows_host._built()
