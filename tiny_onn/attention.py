"""Attention of a block: Native Sparse Attention, or full causal attention as its dense baseline.

    q, k, v = linear(x);  q, k = rope(norm(q)), rope(norm(k))
    y = linear(sum over branches b of sigmoid(linear(x))_b · attention_b(q, k_b, v_b))

- `nsa` (arXiv 2502.11089) has its own keys and values for each of the branches compressed, selected
  and window (the paper's default), or one K/V for all with `shared_kv`.
- Compression acts on keys that RoPE has already turned by their position in the document. It starts
  as the mean over the block (weight I/l, position term 0), for which scores depend on distances
  only; training may move it to maps that do not commute with rotations. Nothing beyond the block
  enters, so causality is that of the block's last token, and a document gives the same wherever it
  is packed.
- Gates have a bias and start at 1/3 each: the mean of the branches.

Shapes: T tokens packed, C width, H query heads, G KV groups, D head dim, l tokens of a compressed
block, Q = (H + 2·G·branches)·D outputs of the joint projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.documents import Documents
from kernels.full_attention import FullCache, full_attention, full_decode
from kernels.nsa import KeysValues, NsaCache, NsaSpec, Phi, nsa_attention_part, nsa_decode
from parallel.group_exchange import GroupExchange, Share
from tiny_onn.fused import Heads
from tiny_onn.norm_rope import RMSNorm, apply_rope

Cache = NsaCache | FullCache
"""What decoding keeps of one sequence in one layer; `length` is the number of tokens in it."""

_SPEC_KEYS = {
    "block": "compress_block",
    "stride": "compress_stride",
    "select": "select_block",
    "selected": "selected",
    "initial": "initial",
    "local": "local",
    "window": "window",
}


@dataclass
class AttentionConfig:
    """Kind and sizes of the attention.

    Attributes:
        kind: "nsa" or "full"; the keys from compress_block on matter to "nsa" only.
        heads: query heads H.
        groups: KV groups G; each serves heads / groups query heads.
        head_dim: D, even.
        qk_norm: RMSNorm over each head of queries and keys, before RoPE.
        rope_theta: base of RoPE's wavelengths.
        compress_block: l, tokens of a compressed block, a multiple of compress_stride.
        compress_stride: d, tokens between compressed blocks.
        select_block: l', tokens of a selected block, a multiple of compress_stride.
        selected: n, selected blocks per query, forced ones included.
        initial: first blocks of a document that are always selected.
        local: last blocks up to the query's that are always selected.
        window: w, tokens of the sliding window.
        shared_kv: the branches share one K and V.
        compression: "linear" learns the map of a block to a token, "mean" averages.
        init_std: standard deviation of the projections' initial weights.
    """

    kind: Literal["nsa", "full"] = "nsa"
    heads: int = 8
    groups: int = 2
    head_dim: int = 64
    qk_norm: bool = True
    rope_theta: float = 10000.0
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    selected: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    shared_kv: bool = False
    compression: Literal["linear", "mean"] = "linear"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together; raises ValueError that names the key."""
        for key, allowed in (("kind", ("nsa", "full")), ("compression", ("linear", "mean"))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"attention.{key} '{getattr(self, key)}' is none of {allowed}")
        for key in ("heads", "groups", "head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"attention.{key} must be >= 1, got {getattr(self, key)}")
        if self.heads % self.groups:
            raise ValueError(
                f"attention.heads = {self.heads} must be a multiple of attention.groups = "
                f"{self.groups}: every KV group serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"attention.head_dim must be even for RoPE, got {self.head_dim}")
        for key in ("rope_theta", "init_std"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(
                    f"attention.{key} must be positive and finite, got {getattr(self, key)}"
                )
        try:
            self.spec()
        except ValueError as error:
            text = str(error)
            for field, key in sorted(_SPEC_KEYS.items(), key=lambda pair: -len(pair[0])):
                text = text.replace(f"NsaSpec.{field} ", f"attention.{key} ")
            raise ValueError(text) from error

    def spec(self) -> NsaSpec:
        """Return the sizes of NSA as its kernels take them."""
        return NsaSpec(**{field: getattr(self, key) for field, key in _SPEC_KEYS.items()})

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.head_dim

    @property
    def kv_branches(self) -> int:
        """How many keys and values a token has."""
        return 3 if self.kind == "nsa" and not self.shared_kv else 1


class Attention(nn.Module):
    """Projections, norms, RoPE, gates and compression around the kernels.

    Attributes:
        record: refresh `stats` in forward.
        stats: of the last recorded forward, fp32 0-dim: mean gates `gate_compressed`,
            `gate_selected`, `gate_window`, and `selected_distance` in tokens; empty for "full".
    """

    def __init__(
        self, cfg: AttentionConfig, width: int, exchange: GroupExchange | None = None
    ) -> None:
        """Draw the weights from the global generator.

        Args:
            cfg: kind and sizes.
            width: C of the residual stream.
            exchange: of the ranks that share a sequence; None where this rank has all of it.
        """
        super().__init__()
        self.cfg = cfg
        self.exchange = exchange
        self.record = False
        self.stats: dict[str, Tensor] = {}
        H, G, D = cfg.heads, cfg.groups, cfg.head_dim
        kv = cfg.kv_branches * G * D
        self._split = [H * D, kv, kv]
        self.w_qkv_QC = nn.Parameter(torch.empty(H * D + 2 * kv, width))
        self.w_out_CQ = nn.Parameter(torch.empty(width, H * D))
        nn.init.normal_(self.w_qkv_QC, std=cfg.init_std)
        nn.init.normal_(self.w_out_CQ, std=cfg.init_std)
        self.q_norm = RMSNorm(D) if cfg.qk_norm else None
        self.k_norm = RMSNorm(D) if cfg.qk_norm else None
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        self.sizes = Heads(H, cfg.kv_branches, G, D, eps)
        if cfg.kind == "full":
            return
        self.spec = cfg.spec()
        self.w_gate_GC = nn.Parameter(torch.empty(3 * H, width))
        self.b_gate_G = nn.Parameter(torch.full((3 * H,), -math.log(2.0)))
        nn.init.normal_(self.w_gate_GC, std=cfg.init_std)
        plain: list[nn.Parameter] = [self.w_gate_GC, self.b_gate_G]
        if cfg.compression == "linear":
            length = cfg.compress_block
            mean_lDD = torch.eye(D).div(length).repeat(length, 1, 1)
            self.phi_k_weight_lDD = nn.Parameter(mean_lDD.clone())
            self.phi_v_weight_lDD = nn.Parameter(mean_lDD)
            self.phi_k_position_lD = nn.Parameter(torch.zeros(length, D))
            self.phi_v_position_lD = nn.Parameter(torch.zeros(length, D))
            plain += [self.phi_k_position_lD, self.phi_v_position_lD]
        for parameter in plain:
            parameter.no_decay = True  # type: ignore[attr-defined]

    def new_cache(self) -> Cache:
        """Return an empty cache for decoding one sequence."""
        return FullCache() if self.cfg.kind == "full" else NsaCache(self.spec)

    def _phi(self) -> tuple[Phi | None, Phi | None]:
        if self.cfg.compression == "mean":
            return None, None
        k = Phi(self.phi_k_weight_lDD, self.phi_k_position_lD)
        v = Phi(self.phi_v_weight_lDD, self.phi_v_position_lD)
        return k, v

    def forward(
        self,
        x_TC: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        docs: Documents | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend within each document, or decode one token.

        Args:
            x_TC: normalised residual stream [T, C]; with an exchange, of this rank's tokens only.
            cos_TD: `rope_tables` of the tokens' positions in their documents, fp32.
            sin_TD: likewise.
            docs: documents of the whole sequence, on x's device; None with a cache.
            cache: of one sequence: T is then 1, the next token, and the cache grows by it.

        Returns:
            [T, C] in x's dtype.

        Raises:
            ValueError: neither or both of docs and cache, or a cache of the other kind.
        """
        if (docs is None) == (cache is None):
            raise ValueError("attention takes documents or, for one token, a cache: exactly one")
        cfg = self.cfg
        T = x_TC.shape[0]
        parts = torch.split(F.linear(x_TC, self.w_qkv_QC), self._split, dim=-1)
        q, k, v = (part.view(T, -1, cfg.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos_TD, sin_TD), apply_rope(k, cos_TD, sin_TD)
        k, v = (x.view(T, cfg.kv_branches, cfg.groups, cfg.head_dim) for x in (k, v))
        gates = self._gates(x_TC)
        if docs is None:
            out = self._decode(q, k, v, gates, cache)
        else:
            out = self.attend(q, k, v, gates, docs)
        return F.linear(out.reshape(T, -1), self.w_out_CQ)

    def attend(
        self,
        q_THD: Tensor,
        k_TbGD: Tensor,
        v_TbGD: Tensor,
        gates_TH3: Tensor | None,
        docs: Documents,
    ) -> Tensor:
        """Attend with what the projections gave of this rank's tokens; [T, H, D]."""
        if self.exchange is None:
            return self._attend(q_THD, k_TbGD, v_TbGD, gates_TH3, docs, 0)
        share = self.exchange.share(docs.total)
        q, k, v, gates = self._to_groups(self.exchange, share, q_THD, k_TbGD, v_TbGD, gates_TH3)
        out = self._attend(q, k, v, gates, docs, share.row_first)
        (out,) = self.exchange.to_tokens(share, out)
        return out

    def _gates(self, x_TC: Tensor) -> Tensor | None:
        """Gates [T, H, 3] of compressed, selected, window; None for full attention."""
        if self.cfg.kind == "full":
            return None
        gates = torch.sigmoid(F.linear(x_TC, self.w_gate_GC, self.b_gate_G))
        return gates.view(-1, self.cfg.heads, 3)

    @staticmethod
    def _to_groups(
        exchange: GroupExchange,
        share: Share,
        q_tHD: Tensor,
        k_tbGD: Tensor,
        v_tbGD: Tensor,
        gates_tH3: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Trade this rank's tokens for whole KV groups: queries and gates of the row, all keys."""
        (t, H, D), R = q_tHD.shape, exchange.row
        b, G = k_tbGD.shape[1:3]
        k_tRbgD, v_tRbgD = (x.view(t, b, R, G // R, D).transpose(1, 2) for x in (k_tbGD, v_tbGD))
        parts = [q_tHD.view(t, R, H // R, D), k_tRbgD, v_tRbgD]
        if gates_tH3 is not None:
            parts.append(gates_tH3.view(t, R, H // R, 3))
        q, k, v, *gates = exchange.to_heads(share, *parts)
        k, v = exchange.gather_rows(share, k, v)
        return q, k, v, gates[0] if gates else None

    def _branches(self, k_TbGD: Tensor, v_TbGD: Tensor) -> KeysValues:
        """Keys and values as NSA takes them, k and v of each branch in turn, [T, G, D] each."""
        shared = 3 if self.cfg.shared_kv else 1
        k_cmp, k_slc, k_win = k_TbGD.unbind(1) * shared
        v_cmp, v_slc, v_win = v_TbGD.unbind(1) * shared
        return k_cmp, v_cmp, k_slc, v_slc, k_win, v_win

    def _decode(
        self,
        q_1HD: Tensor,
        k_1bGD: Tensor,
        v_1bGD: Tensor,
        gates_1H3: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        if gates_1H3 is None:
            if not isinstance(cache, FullCache):
                raise ValueError(f"full attention needs a FullCache, got {type(cache).__name__}")
            return full_decode(q_1HD, k_1bGD[:, 0], v_1bGD[:, 0], cache)
        if not isinstance(cache, NsaCache):
            raise ValueError(f"NSA needs an NsaCache, got {type(cache).__name__}")
        kv = self._branches(k_1bGD, v_1bGD)
        return nsa_decode(q_1HD, *kv, *self._phi(), gates_1H3, cache)

    def _attend(
        self,
        q_nHD: Tensor,
        k_TbGD: Tensor,
        v_TbGD: Tensor,
        gates_nH3: Tensor | None,
        docs: Documents,
        first: int,
    ) -> Tensor:
        """Attend with the queries of tokens [first, first + n); [n, H, D].

        H and G are here the heads and groups at hand, which a rank of a group has a part of.
        """
        if gates_nH3 is None:
            return full_attention(q_nHD, k_TbGD[:, 0], v_TbGD[:, 0], docs, first=first)
        stats: dict[str, Tensor] | None = {} if self.record else None
        kv = self._branches(k_TbGD, v_TbGD)
        out = nsa_attention_part(
            q_nHD, kv, *self._phi(), gates_nH3, docs, self.spec, first, stats=stats
        )
        if stats is not None:
            mean = gates_nH3.detach().float().mean(dim=(0, 1))
            self.stats = {
                "gate_compressed": mean[0],
                "gate_selected": mean[1],
                "gate_window": mean[2],
                "selected_distance": stats["selected_distance"],
            }
        return out
