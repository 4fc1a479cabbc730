"""How far an implementation is from fp64, in units of what plain bf16 attention is off by.

The yardstick is dense attention under the branches' masks, once in fp64 and once in the tensors'
own dtype, with the selection of the implementation under test: its near ties are judged apart, by
the importance they give away. What compressed keys rounded to the tensors' dtype give away anyway
is the yardstick there: at logits of thousands that rounding alone moves a probability of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.naive import block_importance, select_naive, selection_gap
from kernels.nsa.spec import NsaCall, NsaSpec, Phi

NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
Layout = Literal["apart", "model", "shared"]
MAP_NAMES = ("phi_k.weight", "phi_k.position", "phi_v.weight", "phi_v.position")


@dataclass(frozen=True)
class Case:
    """Inputs of one call: the eight tensors of NAMES, then the four of φ or none, and the rest."""

    tensors: tuple[Tensor, ...]
    docs: Documents
    spec: NsaSpec

    @property
    def names(self) -> tuple[str, ...]:
        """Name of every tensor."""
        return (*NAMES, *MAP_NAMES)[: len(self.tensors)]

    def call(self, tensors: Sequence[Tensor] | None = None) -> NsaCall:
        """The call of these tensors, or of others in their place."""
        x = self.tensors if tensors is None else tensors
        q, kc, vc, ks, vs, kw, vw, gates = x[:8]
        phi_k, phi_v = (Phi(*x[8:10]), Phi(*x[10:12])) if len(x) > 8 else (None, None)
        return NsaCall(q, kc, vc, ks, vs, kw, vw, phi_k, phi_v, gates, self.docs, self.spec)


def random_case(
    lengths: Sequence[int],
    heads: int,
    groups: int,
    dim: int,
    *,
    value_dim: int | None = None,
    spec: NsaSpec | None = None,
    mean: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
    magnitude: float = 1.0,
    equal: bool = False,
    layout: Layout = "apart",
) -> Case:
    """Draw random inputs that require gradients; `equal` makes all keys alike, so scores tie.

    `layout` is how keys (and values) of the branches lie: tensors of their own, the model's views
    of one [T, 3, G, D], or shared, the same tensor three times.
    """
    spec = NsaSpec() if spec is None else spec
    value_dim = dim if value_dim is None else value_dim
    docs = Documents(lengths, device)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (x * std).to(dtype).requires_grad_()

    T = docs.total
    q = draw(T, heads, dim, std=magnitude)
    keys = [draw(T, groups, dim) for _ in range(3)]
    if equal:
        keys = [torch.ones_like(k).requires_grad_() for k in keys]
    values = [draw(T, groups, value_dim) for _ in range(3)]
    if layout == "model":
        keys, values = (
            [x.detach().requires_grad_() for x in torch.stack(three, 1).unbind(1)]
            for three in (keys, values)
        )
    elif layout == "shared":
        keys, values = keys[:1] * 3, values[:1] * 3
    gates = torch.sigmoid(draw(T, heads, 3).float()).to(dtype).detach().requires_grad_()
    maps: list[Tensor] = []
    for width in () if mean else (dim, value_dim):
        maps.append(draw(spec.block, width, width, std=(spec.block * width) ** -0.5 * 4))
        maps.append(draw(spec.block, width, std=0.3))
    pairs = [x for pair in zip(keys, values, strict=True) for x in pair]
    return Case((q, *pairs, gates, *maps), docs, spec)


def selection_masks(selected_TGK: Tensor, docs: Documents, spec: NsaSpec) -> list[Tensor]:
    """Turn pack-wide block indices (-1: none) into booleans [n, G, J] per document."""
    masks, base = [], 0
    for start, n in zip(docs.starts, docs.lengths, strict=True):
        own = selected_TGK[start : start + n]
        J = spec.selection_blocks(n)
        local = torch.where(own < 0, J, own - base).long()
        if int(local.min()) < 0 or int(local.max()) > J:
            raise ValueError(
                f"a query of the document at token {start} selected a stranger's block"
            )
        mask = torch.zeros(n, own.shape[1], J + 1, dtype=torch.bool, device=own.device)
        masks.append(mask.scatter_(2, local, True)[..., :J])
        base += J
    return masks


def _attend(q_nHD: Tensor, k_mGD: Tensor, v_mGE: Tensor, seen_Gnm: Tensor, scale: float) -> Tensor:
    if k_mGD.shape[0] == 0:
        return q_nHD.new_zeros(*q_nHD.shape[:2], v_mGE.shape[2])
    repeat = q_nHD.shape[1] // k_mGD.shape[1]
    some = seen_Gnm.any(-1, keepdim=True)
    q, k, v = q_nHD.transpose(0, 1), k_mGD.transpose(0, 1), v_mGE.transpose(0, 1)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    mask = (seen_Gnm | ~some).repeat_interleave(repeat, 0)
    o = F.scaled_dot_product_attention(q[None], k[None], v[None], mask[None], scale=scale)[0]
    return (o * some.repeat_interleave(repeat, 0)).transpose(0, 1)


def _compress(x_nGD: Tensor, maps: Sequence[Tensor], spec: NsaSpec) -> Tensor:
    if spec.compressed_blocks(x_nGD.shape[0]) == 0:
        return x_nGD[:0]
    blocks_NGDl = x_nGD.unfold(0, spec.block, spec.stride)
    if not maps:
        return blocks_NGDl.mean(-1)
    weight_lDE, position_lD = maps
    return torch.einsum("ngdl,lde->nge", blocks_NGDl + position_lD.mT, weight_lDE)


def dense_reference(
    case: Case, tensors: Sequence[Tensor], selection: Sequence[Tensor], scale: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """NSA as dense attention under masks, in the dtype of `tensors`, differentiable.

    Returns:
        out [T, H, DV] and, per document, the importance [n, G, J] that selection is judged by: of
        queries and compressed keys in that dtype, but scores and sums in fp32 at least.
    """
    q, kc, vc, ks, vs, kw, vw, gates, *maps = tensors
    spec = case.spec
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    G = ks.shape[1]
    outputs, importance = [], []
    for b, (start, n) in enumerate(zip(case.docs.starts, case.docs.lengths, strict=True)):
        own = slice(start, start + n)
        t = torch.arange(n, device=q.device)
        causal = t[None] <= t[:, None]
        k, v = _compress(kc[own], maps[:2], spec), _compress(vc[own], maps[2:], spec)
        ends = torch.arange(k.shape[0], device=q.device) * spec.stride + spec.block - 1
        seen = (ends[None] <= t[:, None])[None].expand(G, -1, -1)
        chosen = selection[b].transpose(0, 1).repeat_interleave(spec.select, 2)[..., :n]
        near = causal & (t[:, None] - t[None] < spec.window)
        branches = (
            _attend(q[own], k, v, seen, scale),
            _attend(q[own], ks[own], vs[own], chosen & causal, scale),
            _attend(q[own], kw[own], vw[own], near[None].expand(G, -1, -1), scale),
        )
        gated = [gates[own, :, i, None] * o for i, o in enumerate(branches)]
        outputs.append(gated[0] + gated[1] + gated[2])
        with torch.no_grad():
            wide = torch.promote_types(q.dtype, torch.float32)
            qg = q[own].detach().view(n, G, -1, q.shape[2]).to(wide)
            scores = torch.einsum("ngrd,mgd->ngrm", qg, k.detach().to(wide)) * scale
            hidden = ~seen.transpose(0, 1)[:, :, None]
            p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).nan_to_num(0.0)
            importance.append(block_importance(p, spec))
    return torch.cat(outputs), importance


@dataclass(frozen=True)
class Report:
    """Relative errors of an implementation and of the plain dtype reference, by tensor.

    Attributes:
        errors: name to (own error, reference's error), each |x - fp64| / |fp64|.
        shapes: name to the tensor's shape; "selection" is [T, G, K].
        gap: most importance (of at most H / G per query) that the selection gave away.
        plain_gap: likewise, of the selection by the reference's own importance.
    """

    errors: dict[str, tuple[float, float]]
    shapes: dict[str, list[int]]
    gap: float
    plain_gap: float

    def failures(self, factor: float = 2.0, gap: float = 0.05, floor: float = 1e-5) -> list[str]:
        """Name every tensor off by more than `factor` times the reference's error; NaN is off.

        The selection may give away `gap`, or `factor` times what the reference's gives away.
        """
        bad = [
            f"{name} {self.shapes[name]}: error {own:.3e}, plain {plain:.3e}, "
            f"allowed {max(factor * plain, floor):.3e}"
            for name, (own, plain) in self.errors.items()
            if not own <= max(factor * plain, floor)
        ]
        allowed = max(gap, factor * self.plain_gap)
        if not self.gap <= allowed:
            bad.append(
                f"selection {self.shapes['selection']}: gives away importance {self.gap:.3e}, "
                f"allowed {allowed:.3e}"
            )
        return bad


def compare(
    case: Case, run: Callable[..., Tensor], *, scale: float | None = None, seed: int = 1
) -> Report:
    """Run forward and backward of `run` and of both references; see `Report`.

    `run` is one of its implementations and fills `stats["selected_TGK"]`. Raises
    ValueError when its result has not the shape and dtype of one, or a query selected a block of
    another document.
    """
    stats: dict[str, Tensor] = {}
    out = run(case.call(), scale=scale, stats=stats)
    q, values = case.tensors[0], case.tensors[2]
    if out.shape != (*q.shape[:2], values.shape[2]) or out.dtype != q.dtype:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} for q of {q.dtype} {list(q.shape)} and values "
            f"of {list(values.shape)}"
        )
    generator = torch.Generator(out.device).manual_seed(seed)
    do = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    own = [out.detach(), *torch.autograd.grad(out, case.tensors, do)]
    selection = selection_masks(stats["selected_TGK"], case.docs, case.spec)

    def reference(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        # The same tensor twice is one leaf, which gets the gradients of both places.
        copies = {id(x): x.detach().to(dtype).requires_grad_() for x in case.tensors}
        leaves = [copies[id(x)] for x in case.tensors]
        result, importance = dense_reference(case, leaves, selection, scale)
        grads = torch.autograd.grad(result, leaves, do.to(dtype), allow_unused=True)
        filled = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        return [result.detach(), *filled], importance

    truth, importance = reference(torch.float64)
    plain, plain_importance = reference(out.dtype)
    # The position term of φ for keys shifts all scores of a query alike: its gradient is zero, and
    # only its size next to the weight's gradient says anything. Other gradients may vanish, too,
    # where all keys are alike or a query sees one key: then their size next to do counts, for keys
    # next to do times the logit's slope, which is what their rounding errors grow with.
    size = float(q.detach().double().square().mean().sqrt())
    slope = max(1.0, size * (scale or q.shape[-1] ** -0.5))
    errors = {}
    for name, a, p, x in zip(("out", *case.names), own, plain, truth, strict=True):
        scale_of = truth[1 + case.names.index("phi_k.weight")] if name == "phi_k.position" else x
        least = 1e-2 * do.double().norm() * (slope if name.startswith(("k_", "phi_k")) else 1.0)
        norm = torch.maximum(scale_of.norm(), least)
        errors[name] = (
            float((a.double() - x).norm() / norm),
            float((p.double() - x).norm() / norm),
        )
    plain_selection = [select_naive(x, case.spec) for x in plain_importance]
    gap, plain_gap = (
        max(
            float(selection_gap(i, s, case.spec).max())
            for i, s in zip(importance, chosen, strict=True)
        )
        for chosen in (selection, plain_selection)
    )
    shapes = {name: list(x.shape) for name, x in zip(errors, own, strict=True)}
    shapes["selection"] = list(stats["selected_TGK"].shape)
    return Report(errors, shapes, gap, plain_gap)
