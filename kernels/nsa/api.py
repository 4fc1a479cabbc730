"""The one entry to Native Sparse Attention: checks the call and picks an implementation."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.blocked import nsa_blocked
from kernels.nsa.naive import forced_blocks, nsa_naive
from kernels.nsa.spec import NsaCall, NsaSpec, Phi

Implementation = Literal["auto", "naive", "blocked", "triton"]


def nsa_attention(
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
    implementation: Implementation = "auto",
    stats: dict[str, Tensor] | None = None,
) -> Tensor:
    """Native Sparse Attention over packed documents (arXiv 2502.11089), differentiable.

    Args:
        q_THD: as all arguments up to `spec`, see `NsaCall`. The result has as many rows.
        k_cmp: keys of the compressed branch.
        v_cmp: values of the compressed branch.
        k_slc: keys of the selected branch.
        v_slc: values of the selected branch.
        k_win: keys of the window branch.
        v_win: values of the window branch.
        phi_k: compression of k_cmp.
        phi_v: compression of v_cmp.
        gates_TH3: gates of the branches.
        docs: document boundaries.
        spec: block sizes and counts.
        scale: of the scores, applied in fp32; 1/sqrt(D) by default.
        first: token of the first query. "blocked" computes nothing for the tokens in front of it;
            "triton" and "naive" work through queries of zero there, at a query's full cost.
        implementation: "auto" is Triton on a CUDA device that supports the call, else "blocked";
            "naive" is the fp64 oracle.
        stats: receives "selected_distance", fp32 0-dim on the device: mean tokens from a query to
            the start of its selected blocks, forced ones excluded, 0 when there are none; from
            "triton" also "selected_TGK", see `nsa_attention_triton`.

    Returns:
        [T, H, E] in q's dtype; [T - first, H, E] with `first`.

    Raises:
        ValueError: shapes do not fit together, or "triton" does not support the call (with the
            reason).
    """
    call = NsaCall(
        q_THD, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, phi_k, phi_v, gates_TH3, docs, spec
    )
    _check(call, first)
    if implementation == "triton" or (implementation == "auto" and q_THD.is_cuda):
        reason = _why_not_triton(call, first)
        if reason is None:
            from kernels.nsa.triton_api import nsa_attention_triton

            return nsa_attention_triton(call, scale=scale, first=first, stats=stats, supported=True)
        if implementation == "triton":
            raise ValueError(f"nsa_attention(implementation='triton') cannot run: {reason}")
        warnings.warn(
            f"NSA runs on torch operations, far slower than its Triton kernels: {reason}",
            stacklevel=2,
        )
    if implementation in {"auto", "blocked"}:
        return nsa_blocked(call, scale=scale, first=first, stats=stats)
    if implementation == "naive":
        result = nsa_naive(call.with_queries_in_front(first), scale=scale)
        if stats is not None:
            stats["selected_distance"] = _naive_distance(result.selection, docs, spec, first)
        return result.out_THE[first:].to(q_THD.dtype)
    raise ValueError(
        f"implementation '{implementation}' is none of 'auto', 'naive', 'blocked', 'triton'"
    )


def _why_not_triton(call: NsaCall, first: int) -> str | None:
    # Imported late: a machine without a GPU need not have Triton.
    try:
        from kernels.nsa.triton_api import supports
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "the package triton is not installed"
    return supports(call, first)


def _check(call: NsaCall, first: int) -> None:
    """Refuse tensors that do not fit together; raises ValueError that names the argument."""
    (n, H, D), docs, spec = call.q_THD.shape, call.docs, call.spec
    G, E = call.v_slc.shape[1:]
    T = docs.total
    if n != T - first or not 0 <= first < docs.total:
        after = f" from token {first} on" if first else ""
        raise ValueError(f"q has {n} tokens{after}, the documents have {T} in all")
    if docs.device != call.q_THD.device:
        raise ValueError(
            f"documents are on {docs.device}, q on {call.q_THD.device}: use docs.to(device)"
        )
    if H % G:
        raise ValueError(f"{H} query heads cannot be shared evenly by {G} KV groups")
    for name, x, wanted in (
        *((name, getattr(call, name), (T, G, D)) for name in ("k_cmp", "k_slc", "k_win")),
        *((name, getattr(call, name), (T, G, E)) for name in ("v_cmp", "v_slc", "v_win")),
        ("gates_TH3", call.gates_TH3, (n, H, 3)),
    ):
        if x.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {wanted}")
    for name, phi, width in (("phi_k", call.phi_k, D), ("phi_v", call.phi_v, E)):
        if phi is None:
            continue
        shapes = (tuple(phi.weight_lDD.shape), tuple(phi.position_lD.shape))
        if shapes != ((spec.block, width, width), (spec.block, width)):
            raise ValueError(
                f"{name} has weight {shapes[0]} and position {shapes[1]}, expected "
                f"{(spec.block, width, width)} and {(spec.block, width)}"
            )


def _naive_distance(selection: list[Tensor], docs: Documents, spec: NsaSpec, first: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=selection[0].device)
    count = torch.zeros_like(total)
    for begin, chosen_nGJ in zip(docs.starts, selection, strict=True):
        n, _, J = chosen_nGJ.shape
        _, forced = forced_blocks(n, spec, chosen_nGJ.device)
        t = torch.arange(n, device=chosen_nGJ.device)[:, None]
        start = torch.arange(J, device=chosen_nGJ.device)[None] * spec.select
        free = chosen_nGJ & (~forced & (begin + t >= first))[:, None]
        total += ((t - start)[:, None] * free).sum()
        count += free.sum()
    return (total / count.clamp(min=1)).float()
