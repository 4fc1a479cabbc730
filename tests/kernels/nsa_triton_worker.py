"""Runs NSA's Triton kernels in Triton's interpreter, on CPU, and prints what was wrong as JSON.

A process of its own, because TRITON_INTERPRET is read when kernels are defined. Uninitialised
memory is NaN here, so that an element that no kernel wrote shows in the result.

    TRITON_INTERPRET=1 python -m tests.kernels.nsa_triton_worker NAME...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from kernels.nsa import NsaCache, nsa_attention, nsa_decode, triton_api
from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_api import nsa_attention_triton
from kernels.nsa.triton_check import compare, random_case
from kernels.nsa.triton_layout import packed_layout
from kernels.nsa.triton_ops import NsaFunction, OpInputs, nsa_backward, nsa_forward

SMALL = NsaSpec(block=8, stride=4, select=16, selected=4, initial=1, local=2, window=24)


def check(lengths: list[int], floor: float = 1e-5, **kwargs: Any) -> list[str]:
    """Compare with the references in fp32; return what is off."""
    spec = kwargs.pop("spec", SMALL)
    case = random_case(lengths, spec=spec, dtype=torch.float32, device="cpu", **kwargs)
    return compare(case, nsa_attention_triton).failures(gap=1e-5, floor=floor)


def repeats() -> list[str]:
    """Run forward and backward twice and compare bit for bit."""
    case = random_case([3, 36], 1, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    results = []
    for _ in range(2):
        out = nsa_attention_triton(case.call())
        results.append([out, *torch.autograd.grad(out, case.tensors, torch.ones_like(out))])
    names = ("out", *case.names)
    return [n for n, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]


def strided() -> list[str]:
    """Take q, k and v as slices of wider tensors, with gradients in the right places."""
    case = random_case([30], 2, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    wide = [torch.nn.functional.pad(x.detach(), (3, 5)).requires_grad_() for x in case.tensors[:7]]
    views = [w[..., 3 : 3 + x.shape[-1]] for w, x in zip(wide, case.tensors, strict=False)]
    plain = nsa_attention_triton(case.call())
    sliced = nsa_attention_triton(case.call([*views, *case.tensors[7:]]))
    do = torch.ones_like(plain)
    expected = torch.autograd.grad(plain, case.tensors[:7], do)
    got = torch.autograd.grad(sliced, wide, do)
    bad = [] if torch.equal(plain, sliced) else ["out"]
    return bad + [
        name
        for name, g, e in zip(case.names, got, expected, strict=False)
        if not torch.equal(g[..., 3 : 3 + e.shape[-1]], e)
    ]


def operator() -> list[str]:
    """Compare eager calls with the custom operator that torch.compile sees, bit for bit."""
    case = random_case([3, 36], 2, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    results = []
    for call in (NsaFunction.apply, nsa_forward):
        out = call(*OpInputs.of(case.call(), 0.25))[0]
        results.append([out, *torch.autograd.grad(out, case.tensors, torch.ones_like(out))])
    names = ("out", *case.names)
    return [n for n, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]


def compiled() -> list[str]:
    """Let torch.compile capture and differentiate the public call, compiling nothing."""
    case = random_case([3, 20], 1, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")

    def call(q: torch.Tensor) -> torch.Tensor:
        rest = case.call()[1:]
        return nsa_attention(q * 1.0, *rest, implementation="triton") * 2.0  # type: ignore[arg-type]

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(case.tensors[0])
        results.append([out, *torch.autograd.grad(out, case.tensors, torch.ones_like(out))])
    names = ("out", *case.names)
    return [n for n, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]


def described(results: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    """What torch.compile relies on: dtype, shape and strides of every result."""
    return [(x.dtype, tuple(x.shape), x.stride()) for x in results]


def fakes(tokens: int, chunks: int, **kwargs: Any) -> list[str]:
    """Compare what the operators' fakes promise with what the kernels give."""
    case = random_case([3, tokens], 2, 1, spec=SMALL, dtype=torch.float32, device="cpu", **kwargs)
    real = tuple(OpInputs.of(case.call(), 0.25))
    with torch.no_grad():
        result = nsa_forward(*real)
        grads = nsa_backward(torch.ones_like(result[0]), result[1:], *real)
    found_chunks = (result[10].numel() - 1) // packed_layout(case.docs, SMALL).n_blocks
    with FakeTensorMode() as mode, torch.no_grad():
        fake = tree_map_only(torch.Tensor, mode.from_tensor, real)
        promised = nsa_forward(*fake)
        fake_grads = nsa_backward(torch.empty_like(promised[0]), promised[1:], *fake)
    bad = [] if found_chunks == chunks else [f"{found_chunks} chunks of tokens"]
    for name, found, wanted in (
        ("forward", described(promised), described(result)),
        ("backward", described(fake_grads), described(grads)),
    ):
        if found != wanted:
            bad.append(f"{name}: promised {found}, got {wanted}")
    return bad


def decoding() -> list[str]:
    """Decode token by token and compare with every row of the kernels' forward."""
    case = random_case([75], 2, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    q, *kv, phi_k, phi_v, gates, _, _ = case.call()
    cache, rows = NsaCache(SMALL), []
    for t in range(75):
        own = [x[t : t + 1] for x in (q, *kv, gates)]  # type: ignore[index]
        rows.append(nsa_decode(*own[:7], phi_k, phi_v, own[7], cache))  # type: ignore[arg-type]
    with torch.no_grad():
        whole = nsa_attention_triton(case.call())
    worst = (torch.cat(rows) - whole).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))
    return [f"token {t}: {worst[t]:.1e}" for t in (worst >= 1e-5).nonzero().flatten().tolist()]


def later_queries() -> list[str]:
    """Attend with the queries from the middle of a document on, as the blocked path does."""
    case = random_case([86, 3], 1, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    first = 72
    late = [x.detach()[first:].requires_grad_() for x in (case.tensors[0], case.tensors[7])]
    tensors = [late[0], *case.tensors[1:7], late[1], *case.tensors[8:]]
    results, distances = [], []
    for implementation in ("triton", "blocked"):
        stats: dict[str, torch.Tensor] = {}
        out = nsa_attention(
            *case.call(tensors), first=first, implementation=implementation, stats=stats
        )  # type: ignore[call-overload]
        results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
        distances.append(stats["selected_distance"])
    # The rows in front are queries of zero: their ties would choose the lowest blocks.
    bad = [] if torch.allclose(*distances) else [f"distances {distances}"]
    names = ("out", *case.names)
    return bad + [
        name
        for name, a, b in zip(names, *results, strict=True)
        if name != "phi_k.position" and not (a - b).norm() < 1e-4 * b.norm()
    ]


def asked_once() -> list[str]:
    """Count how often a call is looked at before it is launched: that is time of the host."""
    case = random_case([20], 1, 1, 16, spec=SMALL, dtype=torch.float32, device="cpu")
    counted = Mock(wraps=triton_api.supports)
    with patch.object(triton_api, "supports", counted):
        nsa_attention(*case.call(), implementation="triton")  # type: ignore[arg-type]
    return [] if counted.call_count == 1 else [f"asked {counted.call_count} times"]


def heads_per_group(n: int) -> list[str]:
    """Check n query heads in each of two groups, or in one where there are many."""
    groups = 2 if n < 4 else 1
    return check([36 if n < 16 else 20], heads=groups * n, groups=groups, dim=16)


CASES: dict[str, Callable[[], list[str]]] = {
    **{f"{n} heads per group": partial(heads_per_group, n) for n in (1, 2, 4, 8, 16)},
    **{
        f"head dim {dim}": partial(check, [36], heads=2, groups=1, dim=dim) for dim in (64, 96, 128)
    },
    "values narrower than keys": lambda: check([36], heads=2, groups=1, dim=48, value_dim=32),
    "keys of 192 and values of 128": lambda: check(
        [3, 36], heads=2, groups=1, dim=192, value_dim=128
    ),
    "keys of 160, the mean of a block": lambda: check(
        [30], heads=2, groups=1, dim=160, value_dim=64, mean=True
    ),
    "mean compression": lambda: check([17, 40], heads=2, groups=2, dim=16, mean=True),
    "many documents": lambda: check([1, 7, 15, 16, 17, 31, 33], heads=1, groups=1, dim=16),
    "one token among long ones": lambda: check([40, 1, 50], heads=2, groups=1, dim=16),
    "one token": lambda: check([1], heads=2, groups=1, dim=16),
    "all scores equal": lambda: check([70], heads=1, groups=1, dim=16, equal=True),
    # In fp32 a logit of 1e4, and so its exponential, is known to 1e-3 only; the reference subtracts
    # the maximum first, the kernels the log-sum-exp.
    "logits of 1e4": lambda: check([50], heads=2, groups=1, dim=16, magnitude=5e3, floor=5e-3),
    "blocks without overlap": lambda: check(
        [60], heads=2, groups=1, dim=16,
        spec=NsaSpec(block=8, stride=8, select=16, selected=3, initial=0, local=1, window=20),
    ),
    "the paper's sizes": lambda: check(
        [15, 31, 32, 33, 65], heads=1, groups=1, dim=16, mean=True, spec=NsaSpec(selected=4)
    ),
    "two runs are bitwise equal": repeats,
    "strided inputs": strided,
    "keys and values as the model lays them": lambda: check(
        [3, 40], heads=4, groups=2, dim=16, layout="model"
    ),
    "shared keys and values": lambda: check([40], heads=2, groups=1, dim=16, layout="shared"),
    "decoding gives the rows of the forward": decoding,
    "the public call compiles as one graph": compiled,
    "fakes promise what the kernels give": partial(fakes, 130, 2, dim=16),
    "fakes of other widths without a map": partial(
        fakes, 20, 1, dim=48, value_dim=16, mean=True
    ),
    "queries from the middle of a document on": later_queries,
    "a call is looked at once": asked_once,
    "eager calls equal the custom operator": operator,
}  # fmt: skip


def main(names: list[str]) -> None:
    """Run the named cases, all by default."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = {}
    for name in names or CASES:
        start = time.process_time()
        results[name] = CASES[name]()
        print(f"{name}: {time.process_time() - start:.1f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
