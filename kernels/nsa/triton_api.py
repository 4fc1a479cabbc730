"""Public face of the Triton kernels: what they support, and the call that the dispatcher makes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nsa.spec import NsaCall, NsaSpec
from kernels.nsa.triton_config import INTERPRETED, kernel_configs
from kernels.nsa.triton_layout import packed_layout
from kernels.nsa.triton_ops import OpInputs, list_tokens, nsa


def _is_pow2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def supports(  # noqa: PLR0911  (each return is a reason)
    call: NsaCall, first: int = 0
) -> str | None:
    """Return None when the Triton kernels take these arguments, else the reason why not."""
    q_THD, docs, spec = call.q_THD, call.docs, call.spec
    n, H, D = q_THD.shape
    T = first + n
    G, DV = call.v_slc.shape[1:]
    if not q_THD.is_cuda and not INTERPRETED:
        return f"tensors are on {q_THD.device}; Triton needs a CUDA device (or TRITON_INTERPRET=1)"
    if q_THD.is_cuda and torch.cuda.get_device_capability(q_THD.device)[0] != 9:
        name = torch.cuda.get_device_name(q_THD.device)
        return f"the kernels are written and checked for Hopper (sm_90) and this is an {name}"
    dtypes = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16)
    for field, x in zip(NsaCall._fields, call[:7], strict=False):
        if x.dtype not in dtypes or x.dtype != q_THD.dtype:
            name = field.removesuffix("_THD")
            return f"{name} is {x.dtype}; all of q, k, v must share one of {dtypes}"
    for name, k, v in zip(("cmp", "slc", "win"), call[1:7:2], call[2:7:2], strict=True):
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
    call: NsaCall,
    *,
    scale: float | None = None,
    first: int = 0,
    stats: dict[str, Tensor] | None = None,
    supported: bool = False,
) -> Tensor:
    """Native Sparse Attention by Triton kernels (arXiv 2502.11089, eq. 5 to 12), differentiable.

    Args:
        call: bfloat16 or float16 on a CUDA device; gates never negative.
        scale: of the scores; 1/sqrt(D) by default.
        first: token of the first query; those in front get queries of zero at full cost.
        stats: receives "selected_TGK", the pack-wide index of each selected block (-1: none) of
            these queries, and "selected_distance", see `selected_distance`.
        supported: `supports` has taken this call already, and is not asked again.

    Returns:
        [T, H, DV] in q's dtype. Gradients are bitwise the same from run to run.

    Raises:
        ValueError: with the reason that `supports` gives.
    """
    reason = None if supported else supports(call, first)
    if reason is not None:
        raise ValueError(f"the Triton kernels do not support this call: {reason}")
    call = call.with_queries_in_front(first)
    scale = call.q_THD.shape[-1] ** -0.5 if scale is None else scale
    result = nsa(*OpInputs.of(call, scale))
    if stats is not None:
        selected = result[8].detach()[first:]
        stats["selected_TGK"] = selected
        stats["selected_distance"] = selected_distance(
            selected, packed_layout(call.docs, call.spec).tokens, call.spec, first
        )
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
