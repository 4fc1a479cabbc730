"""Tiny-ONN, top to bottom: token embedding, L sparse blocks, norm, head.

    x = embed(ids)
    for each layer:  x += attention(norm(x));  x += ffn(norm(x)) modulated by DeepEmbed(ids)
    loss = cross entropy(head(norm(x)), labels)

Every sparse part has a dense counterpart by configuration: attention `nsa | full`, feed-forward
`dynmoe | dense`, DeepEmbed `off | output | hidden`.

Shapes: T tokens (documents packed end to end, no batch dimension), C width, V vocabulary, L layers,
U unique ids in the batch, W width of a DeepEmbed vector (C or F), D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kernels import Documents
from kernels.rows import RowIndex, gather_rows
from parallel.group_exchange import GroupExchange
from parallel.table_batch import Parts
from tiny_onn import fused
from tiny_onn.activations import Activations, Checkpointing, checkpointing_of
from tiny_onn.attention import Attention, AttentionConfig, Cache
from tiny_onn.deepembed import (
    DeepEmbedConfig,
    DeepEmbedScale,
    DeepEmbedTable,
    LayerRows,
    split_layers,
)
from tiny_onn.dynmoe import DenseFfn, build_ffn
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.fused import add_and_feed, add_and_norm, compiled, project
from tiny_onn.loss import Head
from tiny_onn.norm_rope import RMSNorm, rope_tables


@dataclass
class ModelConfig:
    """Sizes and kinds of the whole model; each part's configuration stands beside its code.

    Attributes:
        vocab_size: ids in the tokenizer; 0 takes it from the corpus.
        width: residual width C.
        layers: blocks L.
        tie_embeddings: input embedding and output head share one matrix.
        embedding_partition: "zero3" (the input embedding is a parameter like any other) or "rows"
            (it stands in front of DeepEmbed's in the token's row, with the tier, optimizer and
            learning rate of `deepembed`; untied, and not with deepembed.kind hidden).
        norm_eps: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights of embedding and head.
        loss_chunk: tokens whose logits exist at once in the chunked cross entropy.
        compile_blocks: the token-wise parts of a block (norms, projections, RoPE, dense
            feed-forward) go through torch.compile in training on a GPU.
        activation_checkpointing: what is kept for the backward pass: "none" recomputes nothing,
            "recompute" keeps each block's input only, "offload" keeps that in host memory.
    """

    vocab_size: int = 0
    width: int = 256
    layers: int = 4
    tie_embeddings: bool = True
    embedding_partition: Literal["zero3", "rows"] = "zero3"
    norm_eps: float = 1e-5
    init_std: float = 0.02
    loss_chunk: int = 1024
    compile_blocks: bool = False
    activation_checkpointing: Checkpointing | bool = "none"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: DynMoeConfig = field(default_factory=DynMoeConfig)
    deepembed: DeepEmbedConfig = field(default_factory=DeepEmbedConfig)

    def __post_init__(self) -> None:
        """Give old values their names; raises ValueError, naming the key, on what cannot be."""
        self.activation_checkpointing = checkpointing_of(self.activation_checkpointing)
        if self.vocab_size < 0:
            raise ValueError(
                f"model.vocab_size is {self.vocab_size}: set it to 0 to take the corpus's"
            )
        for key in ("width", "layers", "loss_chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} is {getattr(self, key)}: set it to 1 or more")
        for key in ("norm_eps", "init_std"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"model.{key} is {getattr(self, key)}: set it above 0")
        if self.embedding_partition not in ("zero3", "rows"):
            raise ValueError(
                f"embedding_partition {self.embedding_partition!r} is none of zero3, rows"
            )
        self._check_keep_output()
        if self.embedding_partition == "zero3":
            return
        if self.tie_embeddings:
            raise ValueError(
                "embedding_partition rows moves only the rows of a batch, an output head needs all "
                "of them: set tie_embeddings: false"
            )
        if self.deepembed.kind == "hidden" and self.deepembed.partition == "rows":
            raise ValueError(
                "embedding_partition rows needs rows of equal parts: use deepembed.kind output or "
                "off, or deepembed.partition zero3"
            )

    def _check_keep_output(self) -> None:
        needs = {
            "deepembed.kind": (self.deepembed.kind, "output"),
            "deepembed.partition": (self.deepembed.partition, "rows"),
            "ffn.kind": (self.ffn.kind, "dense"),
        }
        wrong = [f"{key} {found}" for key, (found, wanted) in needs.items() if found != wanted]
        if self.activation_checkpointing == "none":
            wrong.append("activation_checkpointing none")
        if self.deepembed.keep_output and wrong:
            raise ValueError(
                "deepembed.keep_output keeps the output of dense layers that would be recomputed, "
                f"and with {', '.join(wrong)} there is none: set it to false"
            )

    @property
    def row_parts(self) -> int:
        """Parts of a token's row in the row-partitioned table: input embedding, then layers."""
        deepembed = self.deepembed.kind != "off" and self.deepembed.partition == "rows"
        return (self.embedding_partition == "rows") + self.layers * deepembed

    @property
    def row_width(self) -> int:
        """Columns of a token's row in the row-partitioned table, 0 without one."""
        embedding = self.width * (self.embedding_partition == "rows")
        layers = self.row_parts - (self.embedding_partition == "rows")
        return embedding + layers * self.deepembed_width

    @property
    def deepembed_width(self) -> int:
        """W: channels that one DeepEmbed vector of one layer scales; 0 when it is off."""
        return {"off": 0, "output": self.width, "hidden": self.ffn.hidden_width()}[
            self.deepembed.kind
        ]


class ModelOutput(NamedTuple):
    """Loss and what is needed to report it.

    Attributes:
        loss: 0-dim fp32, nll_sum * loss_scale: what goes into backward.
        nll_sum: 0-dim fp32, detached, summed negative log-likelihood of all labels in nats.
    """

    loss: Tensor
    nll_sum: Tensor


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm, added to the residual stream.

    Attributes:
        gathered_whole: ZeRO-3 gathers and releases the weights of a layer together.
    """

    gathered_whole = True

    def __init__(
        self, cfg: ModelConfig, layer: int, exchange: GroupExchange | None, sequence: int
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attention = Attention(cfg.attention, cfg.width, exchange)
        self.ffn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.ffn = build_ffn(cfg.ffn, cfg.width, sequence)
        self.deepembed = (
            DeepEmbedScale(layer, cfg.deepembed_width) if cfg.deepembed.kind != "off" else None
        )
        self.scales_hidden = cfg.deepembed.kind == "hidden"
        self.compile_blocks = cfg.compile_blocks

    def forward(
        self,
        x_TC: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        docs: Documents | None,
        loss_scale: Tensor,
        rows: LayerRows | None,
        first: int,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer, [T, C]; with a cache, T is one new token.

        `first` is the index of the first of these tokens in the whole pass.
        """
        # Texts to ask a model about have all lengths: compiling would take longer than answering.
        compiles = self.compile_blocks and self.training and (x_TC.is_cuda or fused.ANYWHERE)
        if compiles and docs is not None:
            heads_TQ = self._attend_compiled(x_TC, cos_TD, sin_TD, docs)
            after = x_TC, heads_TQ, self.attention.w_out_CQ, self.ffn_norm.weight, self.ffn_norm.eps
            if isinstance(self.ffn, DenseFfn) and self.deepembed is None:
                w_in, w_out = self.ffn.w_in_IC, self.ffn.w_out_CF
                fed: Tensor = compiled(add_and_feed)(*after, self.ffn.activation, w_in, w_out)
                return fed
            x_TC, h_TC = compiled(add_and_norm)(*after)
        else:
            x_TC = x_TC + self.attention(self.attention_norm(x_TC), cos_TD, sin_TD, docs, cache)
            h_TC = self.ffn_norm(x_TC)
        if self.deepembed is None or rows is None:
            y_TC: Tensor = self.ffn(h_TC, None, loss_scale, first)
        elif self.scales_hidden:
            delta_TW = self.deepembed(rows.values_UW, rows.index)
            y_TC = self.ffn(h_TC, delta_TW, loss_scale, first)
        else:
            y_TC = self.ffn(h_TC, None, loss_scale, first)
            values_UW, index, sink, keep = rows.values_UW, rows.index, rows.sink, rows.keep
            return self.deepembed.modulate(y_TC, values_UW, index, x_TC, sink, keep)
        return x_TC + y_TC

    def _attend_compiled(
        self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, docs: Documents
    ) -> Tensor:
        """Return the heads of attention side by side, [T, H·D]."""
        a, norm = self.attention, self.attention_norm
        w_q = None if a.q_norm is None else a.q_norm.weight
        w_k = None if a.k_norm is None else a.k_norm.weight
        gates = (None, None) if a.cfg.kind == "full" else (a.w_gate_GC, a.b_gate_G)
        q, k, v, gates_TH3 = compiled(project)(
            x_TC, norm.weight, norm.eps, a.w_qkv_QC, w_q, w_k, *gates, cos_TD, sin_TD, a.sizes
        )
        return a.attend(q, k, v, gates_TH3, docs).reshape(x_TC.shape[0], -1)


class TokenEmbedding(nn.Module):
    """The ordinary input embedding: id -> row of [V, C]."""

    def __init__(self, vocab_size: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=std)
        self.weight.no_decay = True  # type: ignore[attr-defined]

    def forward(self, ids_T: Tensor) -> Tensor:
        """Look up [T] ids; returns [T, C]."""
        return nn.functional.embedding(ids_T, self.weight)


class TinyOnn(nn.Module):
    """The language model."""

    def __init__(
        self, cfg: ModelConfig, exchange: GroupExchange | None = None, sequence: int = 0
    ) -> None:
        """Build with weights drawn from the global generator.

        Args:
            cfg: kinds and sizes.
            exchange: of the ranks that share every pass; None where this rank has all of it.
            sequence: tokens of each of the sequences that training packs into a pass; 0: one pass
                is one sequence. Only which tokens explore experts depends on it.

        Raises:
            ValueError: sizes that cannot be.
        """
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError("model.vocab_size must be set (0 is resolved from the corpus first)")
        self.cfg = cfg
        self.exchange = exchange
        self.embedding = (
            TokenEmbedding(cfg.vocab_size, cfg.width, cfg.init_std)
            if cfg.embedding_partition == "zero3"
            else None
        )
        self.deepembed_table = (
            DeepEmbedTable(cfg.vocab_size, cfg.layers * cfg.deepembed_width, cfg.deepembed)
            if cfg.deepembed.kind != "off" and cfg.deepembed.partition == "zero3"
            else None
        )
        self.blocks = nn.ModuleList(Block(cfg, i, exchange, sequence) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = Head(
            cfg.vocab_size,
            cfg.width,
            cfg.init_std,
            self.embedding.weight if self.embedding is not None and cfg.tie_embeddings else None,
            cfg.loss_chunk,
        )

    def forward(
        self,
        ids_T: Tensor,
        labels_T: Tensor | None,
        docs: Documents | None,
        loss_scale: Tensor,
        layers: Sequence[Tensor] | None = None,
        index: RowIndex | None = None,
        caches: list[Cache] | None = None,
    ) -> ModelOutput | Tensor:
        """Run the model over packed documents, or over one new token with caches.

        Args:
            ids_T: token ids, int64 [T]: with an exchange, those of this rank's share of the
                documents' tokens, and so are labels_T and index.
            labels_T: next-token ids with -100 where there is none, int64 [T]; None asks for logits.
            docs: document boundaries of the whole sequence; None with caches.
            loss_scale: fp32 0-dim, d(loss for backward)/d(nll of one token), averaging included.
            layers: the parts of the rows of the batch's unique ids that are in a row-partitioned
                table, [U, W] each: the input embedding, then DeepEmbed's layers. Asked for one
                after another as they are used.
            index: which of the U rows each token uses.
            caches: one per layer for decoding; ids_T then holds one token.

        Returns:
            ModelOutput, or fp32 logits [T, V] when labels_T is None.
        """
        first = 0
        if caches is not None:
            positions_T = torch.tensor([caches[0].length], device=ids_T.device)
        else:
            assert docs is not None
            stop = docs.total
            if self.exchange is not None:
                share = self.exchange.share(docs.total)
                first, stop = share.first, share.stop
            if ids_T.shape[0] != stop - first:
                raise ValueError(
                    f"{ids_T.shape[0]} ids for the tokens {first}..{stop} of documents of "
                    f"{docs.total} in all"
                )
            positions_T = docs.positions[first:stop]
        x_TC, layers, index = self._rows_of(ids_T, layers, index)
        # DeepEmbed's layers stand behind the input embedding where both are in one row.
        first_layer = int(self.embedding is None and self.deepembed_table is None)
        attention = self.cfg.attention
        cos_TD, sin_TD = rope_tables(positions_T, attention.rope_dim, attention.rope_theta)
        activations = Activations(checkpointing_of(self.cfg.activation_checkpointing))
        for i, block in enumerate(self.blocks):
            rows = self._layer_rows(layers, index, first_layer + i, activations)
            inputs = (cos_TD, sin_TD, docs, loss_scale, rows, first)
            if caches is not None:
                x_TC = block(x_TC, *inputs, caches[i])
            else:
                x_TC = activations.run(block, x_TC, *inputs)
        x_TC = self.norm(x_TC)
        if labels_T is None:
            logits_TV: Tensor = self.head(x_TC)
            return logits_TV
        nll_sum = self.head(x_TC, labels_T)
        return ModelOutput(nll_sum * loss_scale, nll_sum.detach())

    def _rows_of(
        self, ids_T: Tensor, layers: Sequence[Tensor] | None, index: RowIndex | None
    ) -> tuple[Tensor, Sequence[Tensor] | None, RowIndex | None]:
        """Return the embedded tokens, and DeepEmbed's rows with the index of their tokens."""
        if self.cfg.row_parts and (layers is None or index is None):
            raise ValueError("this model has a row-partitioned table: pass layers and index")
        if self.embedding is not None:
            x_TC: Tensor = self.embedding(ids_T)
        else:
            assert layers is not None and index is not None
            # Rows that travel in fp32 meet weights in the compute type.
            x_TC = gather_rows(layers[0], index).to(self.norm.weight.dtype)
        if self.deepembed_table is not None:
            values_UW, index = self.deepembed_table(ids_T)
            layers = split_layers(values_UW, self.cfg.layers)
        elif self.cfg.deepembed.kind == "off":
            layers = None
        return x_TC, layers, index

    def _layer_rows(
        self,
        layers: Sequence[Tensor] | None,
        index: RowIndex | None,
        part: int,
        activations: Activations,
    ) -> LayerRows | None:
        """Return what a layer needs of its rows, waiting for them if need be."""
        if layers is None or index is None:
            return None
        sink = keep = None
        if isinstance(layers, Parts) and self.cfg.deepembed.kind == "output":
            sink = layers.sink(part)
            dense = self.cfg.ffn.kind == "dense" and self.cfg.deepembed.keep_output
            if sink is not None and dense and activations.kind != "none":
                # Nothing else needs a dense layer's output in the backward pass.
                keep = activations.keep
        return LayerRows(layers[part], index, sink, keep)

    def new_caches(self) -> list[Cache]:
        """Return an empty decoding cache for every layer."""
        attentions = (m for m in self.modules() if isinstance(m, Attention))
        return [attention.new_cache() for attention in attentions]
