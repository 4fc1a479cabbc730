"""A trained model as a folder that needs neither its run nor DeepSpeed.

    config.json              sizes and kinds of the model, the step, the type it computes in
    model.safetensors        every weight and buffer by its name in the model
    deepembed.safetensors    "weight" [V, L*W], when the table lived outside the model
    tokenizer.model          of the corpus it was trained on

    exported = load_exported(Path("exports/demo"))
    logits_TV = exported.logits(ids_T)

Nothing in it is code: JSON, safetensors and a sentencepiece model. The table stays on the disk; the
rows of the tokens at hand are read.

Shapes: T tokens, U unique ids, V vocabulary, L layers, W channels that DeepEmbed scales.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernels import Documents
from kernels.rows import RowIndex, row_index, split_layers, unique_ids
from tiny_onn.generation import Sampling, generate
from tiny_onn.modular import ModelConfig, TinyOnn

FORMAT = 1
CONFIG, WEIGHTS, TABLE, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "deepembed.safetensors",
    "tokenizer.model",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ExportError(ValueError):
    """A folder is no exported model, or not one that this version reads; names the file."""


@dataclass
class Exported:
    """A model with what it needs to be asked.

    Attributes:
        cfg: sizes and kinds.
        model: in evaluation mode, on its device.
        step: optimizer steps it was trained for.
        table_VW: the rows of DeepEmbed and perhaps the input embedding, mapped from the disk; None
            when there are none or they are part of the model.
    """

    cfg: ModelConfig
    model: TinyOnn
    step: int
    table_VW: Tensor | None

    def rows(self, ids_T: Tensor) -> tuple[Sequence[Tensor] | None, RowIndex | None]:
        """Return the rows of some tokens, a tensor [U, W] per part of a row, and each one's row."""
        if self.table_VW is None:
            return None, None
        weight = next(self.model.parameters())
        unique_U, inverse_T = unique_ids(ids_T.cpu())
        values_UW = self.table_VW.index_select(0, unique_U).to(weight.device, weight.dtype)
        layers = split_layers(values_UW, self.cfg.row_parts)
        return layers, row_index(inverse_T.to(weight.device), unique_U.shape[0])

    @torch.no_grad()
    def logits(self, ids_T: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Return fp32 logits [T, V] of packed documents.

        Args:
            ids_T: token ids, int64 [T].
            lengths: tokens of each document, sum T; None takes all for one document.
        """
        device = next(self.model.parameters()).device
        documents = Documents(list(lengths or [ids_T.shape[0]]), device)
        one = torch.ones((), device=device)
        found = self.model(ids_T.to(device), None, documents, one, *self.rows(ids_T))
        assert isinstance(found, Tensor)
        return found

    def generate(
        self, prompt: Sequence[int], tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield up to `tokens` ids that continue the prompt; see `generation.generate`."""
        device = next(self.model.parameters()).device
        return generate(
            self.model,
            self.model,
            prompt,
            tokens,
            sampling=sampling,
            rows=self.rows,
            device=device,
        )


def load_exported(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Exported:
    """Load a model that `tiny-onn checkpoint export` wrote.

    Args:
        folder: what it wrote.
        device: where to compute.
        dtype: compute type; None takes the one that it was trained in.

    Raises:
        ExportError: no such folder, a file of it is missing or of another model.
    """
    config = read_config(folder)
    cfg = model_config(config.get("model", {}))
    model = TinyOnn(cfg)
    try:
        state = load_file(folder / WEIGHTS)
        # What is tied is saved once.
        missing, unknown = model.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise ExportError(f"{folder / WEIGHTS}: cannot be loaded: {e}") from e
    shared = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    if unknown or set(missing) - shared:
        raise ExportError(
            f"{folder / WEIGHTS}: lacks {sorted(set(missing) - shared)} and has {sorted(unknown)} "
            f"beyond the model of {CONFIG}"
        )
    compute = dtype or DTYPES[config["compute"]]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
    rows = config["table"] is not None
    table_VW = _mapped(folder / TABLE, "weight") if rows else None
    return Exported(cfg, model.to(device).eval(), int(config["step"]), table_VW)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the description of an exported model; raises ExportError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ExportError(f"{path}: cannot be read: {e}; is {folder} an exported model?") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ExportError(f"{path}: is not of format {FORMAT}, which this version reads")
    return config


def model_config(tree: dict[str, Any]) -> ModelConfig:
    """Return the configuration that nested plain values stand for; raises ExportError."""
    # The parser takes a text in place of a part for a class, and imports its module to look.
    _check_plain(ModelConfig, tree, "model")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, "model")
    try:
        cfg = parser.instantiate(parser.parse_object({"model": tree})).model
    except (jsonargparse.ArgumentError, TypeError, ValueError) as e:
        raise ExportError(f"{CONFIG}: {' '.join(str(e).split())}") from None
    assert isinstance(cfg, ModelConfig)
    return cfg


def _check_plain(cls: type, tree: object, where: str) -> None:
    """Refuse anything but known keys where a dataclass stands; raises ExportError."""
    if not isinstance(tree, dict):
        raise ExportError(f"{CONFIG}: {where} is {tree!r}: expected a mapping of keys")
    hints = get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            raise ExportError(
                f"{CONFIG}: unknown key '{where}.{key}'; this version knows {', '.join(hints)}"
            )
        if isinstance(hints[key], type) and dataclasses.is_dataclass(hints[key]):
            _check_plain(hints[key], value, f"{where}.{key}")


def _mapped(path: Path, name: str) -> Tensor:
    """Map a tensor of a safetensors file into memory; pages are read as they are touched."""
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            entry = json.loads(f.read(length))[name]
        kind = {"F32": (np.float32, torch.float32), "BF16": (np.int16, torch.bfloat16)}
        stored, dtype = kind[entry["dtype"]]
        start, _ = entry["data_offsets"]
        # Copy on write: torch wants memory that it could write to.
        array = np.memmap(path, stored, "c", 8 + length + start, tuple(entry["shape"]))
    except (OSError, ValueError, KeyError, struct.error) as e:
        raise ExportError(f"{path}: holds no tensor '{name}' that can be read: {e}") from e
    return torch.from_numpy(array).view(dtype)
