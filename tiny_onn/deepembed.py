"""DeepEmbed: for every layer and token id one trainable vector that scales a layer's channels.

    y = FFN(x) * (1 + delta[layer, id])      "output", over the C channels of the FFN's output
    h = h * (1 + delta[layer, id])           "hidden", over the F hidden channels inside it

delta starts at 0, has no weight decay and its own learning rate. One id owns one row for all
layers, [V, L*W], so that a batch brings each unique id once. `partition: rows` keeps the table
outside the module (`parallel.tables.RowTable`); `zero3` makes it an ordinary parameter, the
baseline.

Shapes: T tokens, U unique ids of the batch, V vocabulary, L layers, W channels scaled in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.modulate import Keep, Sink, modulate
from kernels.rows import RowIndex, gather_rows, row_index, split_layers, unique_ids
from parallel.table_layout import TableConfig

__all__ = ["DeepEmbedConfig", "DeepEmbedScale", "DeepEmbedTable", "LayerRows", "split_layers"]


@dataclass
class DeepEmbedConfig(TableConfig):
    """What DeepEmbed scales and where its table lives; with the keys of `TableConfig`.

    Attributes:
        kind: "off", "output" (the FFN's output) or "hidden" (its hidden channels).
        partition: "rows" (dealt over the ranks, only touched rows move) or "zero3" (a parameter
            like any other; `tier`, `transport`, `optimizer` and what belongs to them are unused).
        keep_output: under activation checkpointing of dense feed-forward layers, keep what is
            scaled in (pinned) host memory for the rows' gradient rather than redo a layer's last
            product. Takes layers x tokens x width numbers there and changes no bit; only with kind
            `output` and partition `rows`.
    """

    kind: Literal["off", "output", "hidden"] = "output"
    partition: Literal["rows", "zero3"] = "rows"
    keep_output: bool = False

    def validate(self, name: str = "deepembed") -> None:
        """Raise ValueError, naming the key behind `name`, when a value cannot be meant."""
        if self.kind not in ("off", "output", "hidden"):
            raise ValueError(f"{name}: kind {self.kind!r} is none of off, output, hidden")
        if self.partition not in ("rows", "zero3"):
            raise ValueError(f"{name}: partition {self.partition!r} is none of rows, zero3")
        super().validate(name)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """One layer's rows of a batch, on their way into a block.

    No tuple on purpose: DeepSpeed's hooks look for tensors in tuples and lists and wrap each of
    them, twice per block and pass.

    Attributes:
        values_UW: the layer's columns of the batch's unique rows.
        index: which of them each token uses.
        sink: gets their gradient in place of autograd; see `kernels.modulate`.
        keep: keeps what is scaled for the backward pass, where recomputing it costs more.
    """

    values_UW: Tensor
    index: RowIndex
    sink: Sink | None = None
    keep: Keep | None = None


class DeepEmbedScale(nn.Module):
    """One layer's scale; holds no parameters.

    Give it the layer's own columns: `split_layers(values_UW, L)[layer]`, split once outside the
    blocks. Whole rows are taken too (generation, tests), but then every layer's backward makes a
    gradient of all layers' size.
    """

    def __init__(self, layer: int, width: int) -> None:
        """Scale `width` = W channels with the vectors of layer `layer`."""
        super().__init__()
        self.layer = layer
        self.width = width

    def forward(self, values_UW: Tensor, index: Tensor | RowIndex) -> Tensor:
        """Return delta of every token, [T, W], in the type of the rows.

        Who applies it adds 1 in fp32: in bf16 1 + delta would lose every delta below 1/256.

        Args:
            values_UW: the layer's columns [U, W] of the batch's unique rows, or all of them
                [U, L*W].
            index: `Rows.lookup` (sorted once for all layers), or inverse_T int64 [T].
        """
        return gather_rows(self._columns(values_UW), index)

    def modulate(
        self,
        x_TW: Tensor,
        values_UW: Tensor,
        index: Tensor | RowIndex,
        residual_TW: Tensor | None = None,
        sink: Sink | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Return residual + x * (1 + delta), [T, W] in the type of `x_TW`.

        As x + x * delta: in bf16 1 + delta itself would lose every delta below 1/256.
        """
        return modulate(x_TW, self._columns(values_UW), index, residual_TW, sink, keep)

    def _columns(self, values_UW: Tensor) -> Tensor:
        if values_UW.shape[1] == self.width:
            return values_UW
        at = self.layer * self.width
        if values_UW.shape[1] < at + self.width:
            raise ValueError(
                f"DeepEmbed of layer {self.layer} needs {self.width} columns, or rows of at least "
                f"{at + self.width}; got {values_UW.shape[1]}"
            )
        return values_UW[:, at : at + self.width]


class DeepEmbedTable(nn.Module):
    """The table as a parameter, for stock ZeRO-3: all of [V, L*W], zero at first.

    `weight` carries `no_decay = True` and `lr_multiplier` for whoever groups parameters.
    """

    def __init__(self, vocab_size: int, width: int, cfg: DeepEmbedConfig) -> None:
        """Hold `vocab_size` = V rows of `width` = L*W."""
        super().__init__()
        weight_VW = nn.Parameter(torch.zeros(vocab_size, width))
        weight_VW.no_decay = True  # type: ignore[attr-defined]
        weight_VW.lr_multiplier = cfg.lr_multiplier  # type: ignore[attr-defined]
        self.weight = weight_VW

    def forward(self, ids_T: Tensor) -> tuple[Tensor, RowIndex]:
        """Return the unique ids' rows [U, L*W] and which of them each token uses.

        The device is waited for: the number of unique ids is known there only.
        """
        unique_U, inverse_T = unique_ids(ids_T)
        values_UW = nn.functional.embedding(unique_U, self.weight)
        return values_UW, row_index(inverse_T, unique_U.shape[0])
