"""The NSA kernels as two operators: forward and backward of everything.

The forward saves branch outputs, log-sum-exps, the compressed keys and values and the selection;
the backward starts from those. Neither reads anything back to the host. torch.compile sees them as
the custom operators `tiny_onn::nsa_forward` and `tiny_onn::nsa_backward`; eager calls go through
`NsaFunction`, because the custom operator's own autograd costs as much host time as all launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.nsa.spec import NsaCall, NsaSpec
from kernels.nsa.triton_compress import compress, compress_backward
from kernels.nsa.triton_config import KernelConfigs, kernel_configs
from kernels.nsa.triton_delta import branch_deltas
from kernels.nsa.triton_finish import finish_forward
from kernels.nsa.triton_interval import interval_forward
from kernels.nsa.triton_interval_grad_kv import interval_grad_kv
from kernels.nsa.triton_interval_grad_q import interval_grad_q
from kernels.nsa.triton_layout import PackedLayout, packed_layout
from kernels.nsa.triton_select import BlockLists, block_lists, select_blocks
from kernels.nsa.triton_selected_grad import SelectedGrad

SPEC_FIELDS = ("block", "stride", "select", "selected", "initial", "local", "window")


class OpInputs(NamedTuple):
    """What the operators take, flat as an operator must, in the order of `NsaCall`.

    Attributes:
        layout_tensors: the tensors of `PackedLayout`.
        layout_counts: its counts.
        sizes: the SPEC_FIELDS of `NsaSpec`.
    """

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    phi_k_weight: Tensor | None
    phi_k_position: Tensor | None
    phi_v_weight: Tensor | None
    phi_v_position: Tensor | None
    gates: Tensor
    layout_tensors: list[Tensor]
    layout_counts: list[int]
    sizes: list[int]
    scale: float

    @classmethod
    def of(cls, call: NsaCall, scale: float) -> OpInputs:
        """Flatten a call with a query for every token; what does not lie as it must is copied."""
        layout = packed_layout(call.docs, call.spec)
        kc, vc, ks, vs, kw, vw = (x if x.stride(-1) == 1 else x.contiguous() for x in call[1:7])
        wk, pk = (None, None) if call.phi_k is None else call.phi_k
        wv, pv = (None, None) if call.phi_v is None else call.phi_v
        return cls(
            call.q_THD.contiguous(), kc, vc, ks, vs, kw, vw, wk, pk, wv, pv,
            call.gates_TH3.contiguous(),
            [layout.tokens, layout.window, layout.slots, layout.blocks],
            [layout.n_blocks, layout.n_slots, layout.longest_blocks, layout.extra_blocks],
            [getattr(call.spec, name) for name in SPEC_FIELDS], scale,
        )  # fmt: skip

    def layout(self) -> PackedLayout:
        """How the documents lie."""
        tokens, window, slots, blocks = self.layout_tensors
        return PackedLayout(tokens, window, slots, blocks, *self.layout_counts)

    def spec(self) -> NsaSpec:
        """The sizes, named."""
        return NsaSpec(**dict(zip(SPEC_FIELDS, self.sizes, strict=True)))


SCHEMA = (
    "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor v_win, "
    "Tensor? phi_k_weight, Tensor? phi_k_position, Tensor? phi_v_weight, Tensor? phi_v_position, "
    "Tensor gates, Tensor[] layout_tensors, int[] layout_counts, int[] sizes, float scale"
)
"""Of `OpInputs`, as torch.library writes it."""


def list_tokens(T: int, H: int, spec: NsaSpec, configs: KernelConfigs) -> int:
    """Tokens whose selected partials are held at once: a multiple of 128, at least 128."""
    return min(T, max(1, configs.partial_rows // (H * spec.selected) // 128) * 128)


def run_forward(*inputs: Any) -> list[Tensor]:
    """Return out, the branches' o, lse [2, H, T], lse [T, H], k and v compressed, selected, CSR."""
    x = OpInputs(*inputs)
    q, layout, spec, scale = x.q, x.layout(), x.spec(), x.scale
    T, H, D = q.shape
    configs = kernel_configs(D)
    kc = compress(x.k_cmp, x.phi_k_weight, x.phi_k_position, layout, spec)
    vc = compress(x.v_cmp, x.phi_v_weight, x.phi_v_position, layout, spec)
    lse = torch.empty(2, H, T, dtype=torch.float32, device=q.device)
    compressed = interval_forward(
        q, kc, vc, layout.tokens[2], layout.tokens[3], lse[0], scale, configs.forward
    )
    chunk = list_tokens(T, H, spec, configs)
    selected, keys = select_blocks(q, kc, lse[0], layout, spec, scale, chunk, configs)
    lists = block_lists(keys, layout.n_blocks, chunk)
    out, slc, window, lse_slc = finish_forward(
        q, (x.k_slc, x.v_slc), (x.k_win, x.v_win), x.gates, compressed, selected, lists, lse[1],
        layout, spec, scale, configs,
    )  # fmt: skip
    return [
        out, compressed, slc, window, lse, lse_slc, kc, vc, selected, lists.order, lists.bounds
    ]  # fmt: skip


nsa_forward = torch.library.custom_op(
    "tiny_onn::nsa_forward", run_forward, mutates_args=(), schema=f"({SCHEMA}) -> Tensor[]"
)


@nsa_forward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    x = OpInputs(*inputs)
    q, spec = x.q, x.spec()
    T, H, D = q.shape
    G, DV = x.v_slc.shape[1:]
    chunk = list_tokens(T, H, spec, kernel_configs(D))
    n_blocks, n_slots = x.layout_counts[:2]
    lists = -(-T // chunk) * G * n_blocks
    f32, i32 = torch.float32, torch.int32
    o = [q.new_empty(T, H, DV) for _ in range(4)]
    return [
        *o,
        q.new_empty(2, H, T, dtype=f32),
        q.new_empty(T, H, dtype=f32),
        x.k_cmp.new_empty(n_slots, G, D),
        x.v_cmp.new_empty(n_slots, G, DV),
        q.new_empty(T, G, spec.selected, dtype=i32),
        q.new_empty(T * G * spec.selected, dtype=i32),
        q.new_empty(lists + 1, dtype=i32),
    ]


def run_backward(do: Tensor, saved: list[Tensor], *inputs: Any) -> list[Tensor]:
    """Return gradients of q, the six k and v, the gates, then of the φ that were given."""
    x = OpInputs(*inputs)
    q, layout, spec, scale = x.q, x.layout(), x.spec(), x.scale
    T, H, D = q.shape
    configs = kernel_configs(D)
    compressed, slc, window, lse, lse_slc, kc, vc, selected, order, bounds = saved
    chunk = list_tokens(T, H, spec, configs)
    lists = BlockLists(order, bounds, chunk, -(-T // chunk))
    do = do.contiguous()
    delta, folded, delta_slc, folded_slc, dgates = branch_deltas(
        do, compressed, slc, window, x.gates, lse, lse_slc, configs
    )
    dq = torch.empty_like(q)
    token, seen = layout.tokens, layout.window
    slc_grad = SelectedGrad(
        q, x.k_slc, x.v_slc, do, folded_slc, delta_slc, lists, layout, spec, scale, configs
    )
    for c in range(lists.n_chunks):
        slc_grad.chunk(c)
        interval_grad_q(
            dq, q, do, slc_grad.partials, selected, token[0], spec.select,
            (c * chunk, min(T, (c + 1) * chunk)), (kc, vc, token[2], token[3]),
            (x.k_win, x.v_win, seen[0], seen[1]), folded, delta, scale, configs.grad_q,
        )  # fmt: skip
    dk_slc, dv_slc = slc_grad.keys_and_values()
    dk_win, dv_win = interval_grad_kv(
        q, x.k_win, x.v_win, do, folded[1], delta[1], seen[2], seen[3], scale,
        configs.window_grad_kv, splits=1,
    )  # fmt: skip
    dkc, dvc = interval_grad_kv(
        q, kc, vc, do, folded[0], delta[0], layout.slots[2], layout.slots[3], scale,
        configs.grad_kv, splits=H // x.k_slc.shape[1],
    )  # fmt: skip
    dk_cmp, *dphi_k = compress_backward(
        dkc, x.k_cmp, x.phi_k_weight, x.phi_k_position, layout, spec, keys=True
    )
    dv_cmp, *dphi_v = compress_backward(
        dvc, x.v_cmp, x.phi_v_weight, x.phi_v_position, layout, spec
    )
    maps = [g for g in (*dphi_k, *dphi_v) if g is not None]
    return [dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates, *maps]


nsa_backward = torch.library.custom_op(
    "tiny_onn::nsa_backward",
    run_backward,
    mutates_args=(),
    schema=f"(Tensor do, Tensor[] saved, {SCHEMA}) -> Tensor[]",
)


@nsa_backward.register_fake
def _(do: Tensor, saved: list[Tensor], *inputs: Any) -> list[Tensor]:
    x = OpInputs(*inputs)
    given = (*x[:7], x.gates, *x[7:11])
    return [g.new_empty(g.shape) for g in given if g is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, layout_tensors, ctx.counts, ctx.sizes, ctx.scale = inputs
    ctx.n_saved = len(output) - 1
    # Zeros for the gradients of the saved branch outputs would cost as much memory as those.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], *layout_tensors)


def _backward_of(
    ctx: Any, do: Tensor | None, backward: Callable[..., list[Tensor]]
) -> tuple[Any, ...]:
    """Gradients of the first twelve inputs."""
    if do is None:
        return (None,) * 12
    everything = ctx.saved_tensors
    inputs = everything[:12]
    saved = list(everything[12 : 12 + ctx.n_saved])
    layout_tensors = list(everything[12 + ctx.n_saved :])
    result = backward(do, saved, *inputs, layout_tensors, ctx.counts, ctx.sizes, ctx.scale)
    maps = iter(result[8:])
    dphi = [None if p is None else next(maps) for p in inputs[7:11]]
    return (*result[:7], *dphi, result[7])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return (*_backward_of(ctx, grads[0], nsa_backward), [None] * 4, None, None, None)


nsa_forward.register_autograd(_backward, setup_context=_setup)


class NsaFunction(torch.autograd.Function):
    """`nsa_forward` for eager calls: the same arguments and results, bit for bit."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Run the forward; every result but the first is for the backward and for statistics."""
        result = run_forward(*inputs)
        _setup(ctx, inputs, result)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Run the backward from the gradient of the first result."""
        return (*_backward_of(ctx, grads[0], run_backward), None, None, None, None)


def nsa(*inputs: Any) -> Sequence[Tensor]:
    """Call `NsaFunction`, or `nsa_forward` under torch.compile."""
    if torch.compiler.is_compiling():
        compiled: list[Tensor] = nsa_forward(*inputs)
        return compiled
    result: tuple[Tensor, ...] = NsaFunction.apply(*inputs)  # type: ignore[no-untyped-call]
    return result
