"""A checkpoint as a model on its own: weights gathered one at a time into a folder of safetensors.

Host memory holds one parameter, or 64 MiB of table rows, at a time; every file of the checkpoint is
checked against its hash first. `tiny_onn.exported` loads the result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.config import DataConfig
from data.loader import open_corpus
from parallel.checkpoint import Checkpoint, CheckpointError, verify
from parallel.checkpoint_read import DenseReader, TableReader
from parallel.tensor_file import TensorSource, TensorSpec, write_safetensors
from tiny_onn.exported import CONFIG, DTYPES, FORMAT, TABLE, TOKENIZER, WEIGHTS


def export(checkpoint: Checkpoint, out: Path, stored: str = "fp32") -> list[str]:
    """Write a checkpoint's model to a new folder.

    Args:
        checkpoint: opened without a rank.
        out: made here; refused when there is something in it.
        stored: type of the stored weights: "fp32" (the master weights), "bf16", or "compute".

    Returns:
        What a user should know, line by line.

    Raises:
        CheckpointError: the checkpoint is not intact, or has no model.
        ValueError: `out` exists, or the type is unknown.
        OSError: `out` cannot be written.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a folder that does not exist")
    problems = verify(checkpoint.path)
    if problems:
        raise CheckpointError(f"not exported, because it is not intact: {problems[0]}")
    config = checkpoint.meta["config"]
    compute = str(checkpoint.meta["compute"])
    name = compute if stored == "compute" else stored
    if name not in DTYPES:
        raise ValueError(f"--dtype {stored} is none of {', '.join(DTYPES)}, compute")
    out.mkdir(parents=True, exist_ok=True)
    lines = [_weights(checkpoint, out / WEIGHTS, DTYPES[name])]
    tables = TableReader.all(checkpoint)
    if tables:
        lines.append(_table(tables[0], out / TABLE, DTYPES[name]))
    lines.append(_tokenizer(config, out / TOKENIZER))
    description = {
        "format": FORMAT,
        "run": checkpoint.meta["run"],
        "step": checkpoint.step,
        "tokens": checkpoint.meta["tokens"],
        "compute": compute,
        "table": {"rows": tables[0].rows, "width": tables[0].widths["weight"]} if tables else None,
        "model": config["model"],
    }
    (out / CONFIG).write_text(json.dumps(description, indent=1) + "\n")
    return lines


def _weights(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> str:
    reader = DenseReader(checkpoint)
    buffers = TensorSource.of(reader.buffers())
    shapes = reader.shapes
    specs = {**buffers.specs, **{n: TensorSpec(dtype, shape) for n, shape in shapes.items()}}

    def tensors() -> Iterator[Tensor]:
        yield from buffers.parts()
        for _, tensor in reader.parameters():
            yield tensor.to(dtype)

    write_safetensors(path, TensorSource(specs, tensors), {"format": "pt"})
    numbers = sum(TensorSpec(dtype, shape).nbytes for shape in shapes.values()) // dtype.itemsize
    return f"{path}: {len(shapes)} weights of {numbers:,} numbers"


def _table(reader: TableReader, path: Path, dtype: torch.dtype) -> str:
    shape = (reader.rows, reader.widths["weight"])

    def tensors() -> Iterator[Tensor]:
        for _, fields in reader.stretches(["weight"]):
            yield fields["weight"].to(dtype)

    source = TensorSource({"weight": TensorSpec(dtype, shape)}, tensors)
    write_safetensors(path, source, {"format": "pt"})
    return f"{path}: {shape[0]:,} rows of {shape[1]:,} numbers"


def _tokenizer(config: dict[str, Any], path: Path) -> str:
    known = {f.name for f in dataclasses.fields(DataConfig)} - {"build"}
    data = DataConfig(**{k: v for k, v in config["data"].items() if k in known})
    try:
        open_corpus(data).tokenizer.save(path)
    except (ValueError, OSError) as e:
        return f"no {path.name}: the corpus {data.path} cannot be opened ({e})"
    return f"{path}: tokenizer of {data.path}"
