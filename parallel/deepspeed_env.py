"""Importing DeepSpeed: the one place that knows its environment variables, op builds and log noise.

`load_deepspeed(mesh)` returns the module, ready for `deepspeed.zero.Init` and
`deepspeed.initialize`. In the default configuration nothing is compiled, on CPU or GPU. What
compiles on first use, into `TORCH_EXTENSIONS_DIR` (torch's default is ~/.cache/torch_extensions):

- `optimizer.kernel: deepspeed` with offloaded optimizer states builds cpu_adam;
- `offload.optimizer: nvme` or `offload.params: nvme` builds async_io, which needs libaio's headers
  (Debian: libaio-dev) and ninja.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from parallel.mesh import Mesh


class DeepSpeedError(RuntimeError):
    """DeepSpeed cannot do what the configuration asks on this machine; says what to install."""


def load_deepspeed(mesh: Mesh) -> ModuleType:
    """Import DeepSpeed, attach it to the process groups of `mesh`, and return the module.

    Must come after `init_mesh()`, and before anything else imports DeepSpeed.
    """
    prepare_environment(os.environ, mesh)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch_backend: Any = importlib.import_module("deepspeed.comm.torch")
    # On CPU the backend compiles a shared-memory all-reduce when it starts (1–2 minutes). Only
    # tensor-parallel inference uses it; collectives of training go to gloo either way.
    torch_backend.build_shm_op = lambda: None
    with _without_torch_compile():
        # Every initialize() imports Muon to ask whether the optimizer is one, and that module
        # compiles its kernels on import, which loads inductor: 5 s per process for nothing.
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # DeepSpeed still calls the names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def _without_torch_compile() -> Iterator[None]:
    namespace: Any = torch
    original = namespace.compile
    namespace.compile = lambda model=None, **_: model if model is not None else (lambda f: f)
    try:
        yield
    finally:
        namespace.compile = original


def prepare_environment(environment: MutableMapping[str, str], mesh: Mesh) -> None:
    """Set what DeepSpeed reads from the environment, in place."""
    # Its own detection logs a warning on CPU machines and ignores a request for the CPU on others.
    environment["DS_ACCELERATOR"] = mesh.device.type
    environment["LOCAL_RANK"] = str(mesh.local_rank)
    # Without it the CPU accelerator runs numactl at every gradient reduction to count devices.
    environment["LOCAL_SIZE"] = str(mesh.local_world)
    architectures = environment.get("TORCH_CUDA_ARCH_LIST")
    if architectures:
        # The op builder cannot read architecture-specific targets such as 9.0a.
        environment["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(\d+\.\d+)[a-z]", r"\1", architectures)


def require_async_io(deepspeed: ModuleType) -> None:
    """Check that NVMe offload can run here.

    Raises:
        DeepSpeedError: libaio's headers or ninja are missing.
    """
    builder = importlib.import_module(f"{deepspeed.__name__}.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise DeepSpeedError(
            "offload to nvme needs DeepSpeed's async_io op, which needs libaio with its headers "
            "(Debian: apt-get install libaio-dev; or point CFLAGS and LDFLAGS at a copy); "
            "offload to cpu needs neither"
        )
    compile_op("AsyncIOBuilder", "pin_memory", "async_io")


def compile_op(builder: str, *folders: str) -> None:
    """Load one of DeepSpeed's ops, compiled by the first process of this machine that wants it.

    torch guards a compilation by a file that a killed process leaves behind, and that every later
    one waits on for ever. Here the kernel's lock decides, which ends with its holder.

    Args:
        builder: class in deepspeed.ops.op_builder.
        folders: names under which torch compiles it and what it loads first.
    """
    extensions: Any = importlib.import_module("torch.utils.cpp_extension")
    roots = [Path(extensions._get_build_directory(name, False)) for name in folders]
    with (roots[-1].parent / f"{folders[-1]}.compiling").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for root in roots:
            (root / "lock").unlink(missing_ok=True)
        getattr(importlib.import_module("deepspeed.ops.op_builder"), builder)().load(verbose=False)
