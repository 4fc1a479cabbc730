"""Public face of the Triton kernels: what they support, and the call that the dispatcher makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.spec import NsaSpec, Phi
from kernels.nsa.triton_config import INTERPRETED, kernel_configs
from kernels.nsa.triton_layout import packed_layout
from kernels.nsa.triton_ops import SPEC_FIELDS, list_tokens, nsa


def _is_pow2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def supports(  # noqa: PLR0911  (each return is a reason)
    q_THD: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    phi_k: Phi | None,
    phi_v: Phi | None,
    gates_TH3: Tensor,
    docs: Documents,
    spec: NsaSpec,
    first: int = 0,
) -> str | None:
    """Return None when the Triton kernels take these arguments, else the reason why not."""
    n, H, D = q_THD.shape
    T = first + n
    G, DV = v_slc.shape[1:]
    if not q_THD.is_cuda and not INTERPRETED:
        return f"tensors are on {q_THD.device}; Triton needs a CUDA device (or TRITON_INTERPRET=1)"
    if q_THD.is_cuda and torch.cuda.get_device_capability(q_THD.device)[0] != 9:
        name = torch.cuda.get_device_name(q_THD.device)
        return f"the kernels are written and checked for Hopper (sm_90) and this is an {name}"
    dtypes = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16)
    for name, x in (
        ("q", q_THD), ("k_cmp", k_cmp), ("v_cmp", v_cmp), ("k_slc", k_slc), ("v_slc", v_slc),
        ("k_win", k_win), ("v_win", v_win),
    ):  # fmt: skip
        if x.dtype not in dtypes or x.dtype != q_THD.dtype:
            return f"{name} is {x.dtype}; all of q, k, v must share one of {dtypes}"
    for name, k, v in (("cmp", k_cmp, v_cmp), ("slc", k_slc, v_slc), ("win", k_win, v_win)):
        if k.shape != (T, G, D) or v.shape != (T, G, DV):
            return f"k_{name} {tuple(k.shape)} or v_{name} {tuple(v.shape)} differs from the others"
    if H % G or H // G not in {1, 2, 4, 8, 16}:
        return f"{H} query heads over {G} KV groups; 1, 2, 4, 8 or 16 heads per group are supported"
    if D > 192 or DV > 128:
        return f"head dims {D} (keys) and {DV} (values); at most 192 and 128 are supported"
    if spec.block not in {spec.stride, 2 * spec.stride}:
        return f"block {spec.block} must be one or two strides of {spec.stride}"
    if not _is_pow2(spec.stride) or not _is_pow2(spec.select) or not 16 <= spec.select <= 128:
        return (
            f"stride {spec.stride} and select {spec.select} must be powers of two, select 16..128"
        )
    if docs.device.type != q_THD.device.type or docs.device.index not in {
        None,
        q_THD.device.index,
    }:
        return f"documents are on {docs.device}, tensors on {q_THD.device}: use docs.to(device)"
    layout = packed_layout(docs, spec)
    configs = kernel_configs(D)
    lists = -(-T // list_tokens(T, H, spec, configs)) * G * layout.n_blocks
    if max(T * H * spec.selected, lists) >= 2**31:
        return f"{T} tokens x {H} heads x {spec.selected} selected blocks overflow 32-bit indices"
    return None


def nsa_attention_triton(
    q_THD: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    phi_k: Phi | None,
    phi_v: Phi | None,
    gates_TH3: Tensor,
    docs: Documents,
    spec: NsaSpec,
    *,
    scale: float | None = None,
    first: int = 0,
    stats: dict[str, Tensor] | None = None,
    supported: bool = False,
) -> Tensor:
    """Native Sparse Attention by Triton kernels (arXiv 2502.11089, eq. 5 to 12), differentiable.

    Args:
        q_THD: queries [T, H, D], bfloat16 or float16 on a CUDA device; with `first` those of the
            tokens [first, T), and so are the gates and the result.
        k_cmp: keys [T, G, D] of the compressed branch; likewise k_slc and k_win.
        v_cmp: values [T, G, DV] of the compressed branch; likewise v_slc and v_win.
        k_slc: keys of the selected branch.
        v_slc: values of the selected branch.
        k_win: keys of the window branch.
        v_win: values of the window branch.
        phi_k: compression of k_cmp; None takes the mean.
        phi_v: compression of v_cmp; None takes the mean.
        gates_TH3: gates (after the sigmoid, never negative) of compressed, selected, window,
            [T, H, 3].
        docs: document boundaries, on q's device.
        spec: the sizes.
        scale: of the scores; 1/sqrt(D) by default.
        first: token of the first query. The kernels know no queries that begin inside the pack:
            the tokens in front get queries of zero, which cost as much as any other.
        stats: receives "selected_TGK", the pack-wide index of each selected block (-1: none) of
            these queries, and "selected_distance", see `selected_distance`.
        supported: `supports` has taken this call already, and is not asked again.

    Returns:
        [T, H, DV] in q's dtype. Gradients are bitwise the same from run to run.

    Raises:
        ValueError: with the reason that `supports` gives.
    """
    call = (q_THD, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, phi_k, phi_v, gates_TH3, docs, spec)
    reason = None if supported else supports(*call, first)
    if reason is not None:
        raise ValueError(f"the Triton kernels do not support this call: {reason}")
    if first:
        q_THD, gates_TH3 = (F.pad(x, (0, 0, 0, 0, first, 0)) for x in (q_THD, gates_TH3))
    layout = packed_layout(docs, spec)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    q, *kv = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (q_THD, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    )
    wk, pk = (None, None) if phi_k is None else phi_k
    wv, pv = (None, None) if phi_v is None else phi_v
    result = nsa(
        q.contiguous(), *kv, wk, pk, wv, pv, gates_TH3.contiguous(),
        [layout.tokens, layout.window, layout.slots, layout.blocks],
        [layout.n_blocks, layout.n_slots, layout.longest_blocks, layout.extra_blocks],
        [getattr(spec, name) for name in SPEC_FIELDS], scale,
    )  # fmt: skip
    if stats is not None:
        selected = result[8].detach()[first:]
        stats["selected_TGK"] = selected
        stats["selected_distance"] = selected_distance(selected, layout.tokens, spec, first)
    return result[0][first:] if first else result[0]


def selected_distance(
    selected_nGK: Tensor, tokens_4T: Tensor, spec: NsaSpec, first: int = 0
) -> Tensor:
    """Mean distance in tokens from a query to the start of its selected blocks, fp32 0-dim.

    Args:
        selected_nGK: selected blocks of the queries of the tokens [first, T), -1 for none.
        tokens_4T: `PackedLayout.tokens`.
        spec: the sizes.
        first: token of the first query.

    Returns:
        The mean over the blocks that are not forced; 0 where no query has a free choice.
    """
    document, block = tokens_4T[0, first:], tokens_4T[1, first:]
    position = (
        torch.arange(first, first + len(document), device=document.device, dtype=torch.int32)
        - document
    )
    local = selected_nGK - block[:, None, None]
    current = (position // spec.select)[:, None, None]
    free = (selected_nGK >= 0) & (local >= spec.initial) & (local <= current - spec.local)
    distance = torch.where(free, position[:, None, None] - local * spec.select, 0)
    return distance.sum(dtype=torch.float32) / free.sum().clamp(min=1)
