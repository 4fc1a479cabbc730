"""`kernels.rows_step` for host memory, compiled: one pass over memory, threaded, without the GIL.

`rows_host.cpp` is compiled on first use (about 2 s) into `TORCH_EXTENSIONS_DIR`, or
~/.cache/torch_extensions, once per kind of processor.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels.rows_step import (
    KINDS,
    Clock,
    Counter,
    Fields,
    RowKernels,
    Rule,
    TorchRows,
    Transport,
)

SOURCE = Path(__file__).with_name("rows_host.cpp")
# No contraction to fused multiply-adds: the same bits on every processor. No unsafe mathematics.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]

Choice = Literal["compiled", "torch"]


class RowKernelError(RuntimeError):
    """The compiled kernels cannot be built here; the message says what to do."""


def row_kernels(choice: Choice, threads: int) -> RowKernels:
    """Return the kernels of this name; "compiled" uses so many threads.

    Raises:
        RowKernelError: "compiled" cannot be built on this machine.
        ValueError: no such implementation.
    """
    if choice == "torch":
        return TorchRows()
    if choice == "compiled":
        return CompiledRows(threads)
    raise ValueError(f"row kernels {choice!r} are none of compiled, torch")


class CompiledRows:
    """The kernels of `rows_host.cpp`; every tensor must be in host memory."""

    name = "compiled"

    def __init__(self, threads: int) -> None:
        """Build or load the library; raises RowKernelError."""
        self.threads = max(1, threads)
        self._library = _library()

    def gather(
        self,
        source_SW: Tensor,
        slots_N: Tensor,
        out_LPw: Tensor,
        places_N: Tensor | None = None,
        ready: Counter | None = None,
    ) -> None:
        """See `RowKernels.gather`."""
        parts, rows, width = out_LPw.shape
        self._library.rows_gather(
            _pointer(source_SW),
            source_SW.stride(0),
            _pointer(slots_N),
            slots_N.shape[0],
            width,
            parts,
            _pointer(out_LPw),
            _is_bf16(out_LPw),
            rows * width,
            _pointer(places_N),
            _address(ready),
            self.threads,
        )

    def add(
        self,
        total_Pw: Tensor,
        places_N: Tensor,
        fresh_N: Tensor,
        grad_Nw: Tensor,
        squares_P: Tensor,
    ) -> None:
        """See `RowKernels.add`."""
        self._library.rows_add(
            _pointer(total_Pw),
            _pointer(places_N),
            _pointer(fresh_N),
            places_N.shape[0],
            total_Pw.shape[1],
            _pointer(grad_Nw),
            _is_bf16(grad_Nw, rows_apart=True),
            grad_Nw.stride(0),
            _pointer(squares_P),
            self.threads,
        )

    def step(
        self,
        rule: Rule,
        slots_N: Tensor,
        fields: Fields,
        clock: Clock,
        grads_LPw: Sequence[Tensor],
        out: Transport | None,
        ready: Counter | None = None,
    ) -> None:
        """See `RowKernels.step`."""
        parts, (rows, width) = len(grads_LPw), grads_LPw[0].shape
        if rows != slots_N.shape[0] or any(g.shape != (rows, width) for g in grads_LPw):
            raise ValueError(
                f"{slots_N.shape[0]} rows to step with gradients of shapes "
                f"{[tuple(g.shape) for g in grads_LPw]}"
            )
        if len({(_is_bf16(g, rows_apart=True), g.stride(0)) for g in grads_LPw}) != 1:
            raise ValueError("a step's gradients have one type and rows equally far apart")
        weight_SW, first_SW, second = fields
        step = _Step(
            KINDS.index(rule.kind),
            slots_N.shape[0],
            width,
            _pointer(slots_N),
            _pointer(weight_SW),
            _pointer(first_SW),
            _pointer(second),
            weight_SW.stride(0),
            first_SW.stride(0),
            second.stride(0),
            None,
            _is_bf16(grads_LPw[0], rows_apart=True),
            grads_LPw[0].stride(0),
            rule.clip,
            *rule.betas,
            rule.eps,
            1.0 - rule.lr * rule.weight_decay,
            rule.lr,
            _pointer(clock.step_size_N),
            _pointer(clock.root_correction_N),
            _pointer(out and out.rows_LPw),
            0 if out is None else _is_bf16(out.rows_LPw),
            _pointer(out and out.places_N),
            parts,
            width,
            width,
            second.shape[1] // parts,
            0 if out is None else out.rows_LPw[0].numel(),
            (ctypes.c_void_p * parts)(*(_pointer(grad) for grad in grads_LPw)),
            _address(ready),
        )
        self._library.rows_step(ctypes.byref(step), self.threads)

    def checksum(self, words_SR: Tensor, places_N: Tensor, factors_R: Tensor) -> Tensor:
        """See `RowKernels.checksum`."""
        sums_N = torch.empty_like(places_N)
        self._library.rows_checksum(
            _pointer(words_SR),
            words_SR.shape[1],
            _pointer(places_N),
            places_N.shape[0],
            _pointer(factors_R),
            _pointer(sums_N),
            self.threads,
        )
        return sums_N


class _Step(ctypes.Structure):
    """`Step` of rows_host.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "n", "w")),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("weight", "first", "second")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("weight", "first", "second")),
        ("grad", ctypes.c_void_p),
        ("grad_bf16", ctypes.c_int64),
        ("grad_stride", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("clip", "beta1", "beta2", "eps", "decay", "lr")),
        *((name, ctypes.c_void_p) for name in ("step_size", "root_correction", "out")),
        ("out_bf16", ctypes.c_int64),
        ("out_places", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        *((f"{name}_next", ctypes.c_int64) for name in ("weight", "first", "second", "out")),
        ("grads", ctypes.POINTER(ctypes.c_void_p)),
        ("ready", ctypes.c_void_p),
    ]


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or (tensor.dim() and tensor.stride(-1) != 1):
        raise ValueError(
            f"compiled row kernels take host memory with adjacent columns, not {tensor.device} "
            f"with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def _address(counter: Counter | None) -> int | None:
    return None if counter is None else ctypes.addressof(counter)


def _is_bf16(tensor: Tensor, *, rows_apart: bool = False) -> int:
    whole = rows_apart or tensor.is_contiguous()
    if tensor.dtype not in (torch.float32, torch.bfloat16) or not whole:
        raise ValueError(
            f"rows travel as contiguous float32 or bfloat16, not as {tensor.dtype} with strides "
            f"{tensor.stride()}"
        )
    return int(tensor.dtype == torch.bfloat16)


@functools.cache
def _library() -> ctypes.CDLL:
    path = str(_built())
    with _waiting_asleep():
        library = ctypes.CDLL(path)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for function in ("gather", "add", "step", "checksum"):
        getattr(library, f"rows_{function}").restype = None
    library.rows_gather.argtypes = [
        *(pointer, number, pointer, number, number, number),
        *(pointer, number, number, pointer, pointer, number),
    ]
    library.rows_add.argtypes = [
        *(pointer, pointer, pointer, number, number),
        *(pointer, number, number, pointer, number),
    ]
    library.rows_step.argtypes = [pointer, number]
    library.rows_checksum.argtypes = [pointer, number, pointer, number, pointer, pointer, number]
    return library


@contextmanager
def _waiting_asleep() -> Iterator[None]:
    """Have OpenMP's idle threads sleep: spinning, they would slow the threads that launch kernels.

    The library's OpenMP reads this once, when it is loaded; torch has one of its own.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]


def _built() -> Path:
    """Return the library, compiled by the first process that wants it."""
    compiler = os.environ.get("CXX", "c++")
    processor = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    # Machines with different processors may share the folder.
    key = hashlib.sha256(f"{SOURCE.read_text()} {FLAGS} {compiler} {processor}".encode())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    path = root / f"tiny_onn_rows-{key.hexdigest()[:16]}.so"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path
            # Named by process: on a network file system another machine may hold the lock, too.
            fresh = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RowKernelError(_REMEDY.format(" ".join(command), done.stderr[-2000:]))
            os.replace(fresh, path)
    except OSError as error:
        raise RowKernelError(_REMEDY.format(compiler, error)) from error
    return path


_REMEDY = (
    "the row kernels do not compile: {}: {}; install a C++ compiler with OpenMP (Debian: g++) or "
    "name it in CXX, set TORCH_EXTENSIONS_DIR to a writable folder, or set the table's `kernel: "
    "torch`, which is many times slower"
)
