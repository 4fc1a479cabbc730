"""Safetensors files written as their tensors come, and read one tensor at a time.

The library's own writer wants every tensor in memory at once, and copies each. Here a file's names
and sizes are known first (they are its header), and then the tensors follow one by one, hashed on
the way: a shard may be far larger than the memory that its writing takes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRITE_BYTES = 8 * 2**20
"""Bytes of one write; between two of them other threads get their turn."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """Type and sizes of a tensor that is still to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe an existing tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource:
    """Tensors of one file: what they are is known at once, they themselves come in that order.

    Attributes:
        specs: every tensor by name, in order.
        in_memory: the tensors can be read on any thread while training goes on; otherwise they are
            the live state, to be read on the caller's thread before the next step.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        tensors: Callable[[], Iterator[Tensor]],
        *,
        in_memory: bool = True,
        close: Callable[[], None] | None = None,
    ) -> None:
        """Describe tensors that `tensors()` yields in the order of `specs`."""
        self.specs, self._tensors, self.in_memory, self._close = specs, tensors, in_memory, close

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TensorSource:
        """Give tensors that exist already, the widest types first so that all are aligned."""
        names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        specs = {name: TensorSpec.of(tensors[name]) for name in names}
        return cls(specs, lambda: (tensors[name] for name in names))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor); a tensor may be overwritten once the next one is asked for."""
        yield from zip(self.specs, self._tensors(), strict=True)

    def parts(self) -> Iterator[Tensor]:
        """Yield the elements of all tensors in order; a large one may come in several parts."""
        return self._tensors()

    def close(self) -> None:
        """Say that no tensor will be asked for any more."""
        if self._close is not None:
            self._close()


def joined(sources: Sequence[TensorSource]) -> TensorSource:
    """Return the tensors of several sources as those of one file."""
    specs = {name: spec for source in sources for name, spec in source.specs.items()}

    def close() -> None:
        for source in sources:
            source.close()

    return TensorSource(
        specs,
        lambda: (tensor for source in sources for _, tensor in source),
        in_memory=all(source.in_memory for source in sources),
        close=close,
    )


def header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what a safetensors file begins with: a length, names, types, shapes and places."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path,
    source: TensorSource,
    metadata: Mapping[str, str] | None = None,
    moved: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write and sync a file; return its size and SHA-256, the entry of a manifest.

    Args:
        path: replaced if it exists.
        source: what it holds; not closed here.
        metadata: text by name in the file's header.
        moved: told the bytes of every write.

    Raises:
        OSError: a full disk, a read-only folder …
        ValueError: a tensor is not what the source announced.
    """
    sha256, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:

        def put(data: memoryview) -> None:
            nonlocal size
            for at in range(0, len(data), WRITE_BYTES):
                part = data[at : at + WRITE_BYTES]
                sha256.update(part)
                while part:
                    written = os.write(descriptor, part)
                    size += written
                    moved(written)
                    part = part[written:]

        put(memoryview(header(source.specs, metadata)))
        parts = source.parts()
        for name, spec in source.specs.items():
            missing = spec.nbytes
            while True:
                part = next(parts, None)
                if part is None or part.dtype != spec.dtype or part.nbytes > missing:
                    found = "nothing" if part is None else str(TensorSpec.of(part))
                    raise ValueError(f"{path}: {found} came for tensor '{name}', which is {spec}")
                flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                put(flat.numpy().data)
                missing -= part.nbytes
                if not missing:
                    break
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": sha256.hexdigest()}


class ShardFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it is missing or not safetensors; whatever else it holds is never run.
        """
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as e:
            raise OSError(f"{path}: not a safetensors file: {e}") from e
        self._file, self._keys, self.path = file, dict.fromkeys(file.keys()), path

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor."""
        if key not in self._keys:
            raise KeyError(f"{self.path} has no tensor '{key}'")
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) along the first dimension of a tensor."""
        tensor: Tensor = self._file.get_slice(key)[start:stop]
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's sizes without reading it."""
        return tuple(self._file.get_slice(key).get_shape())

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._keys)
