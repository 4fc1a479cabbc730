"""What can be configured about the engine: precision, optimizer, schedule, offload, ZeRO tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from parallel.schedule import ScheduleConfig


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, on matrices only.
        clip: bound on the global gradient norm, tables included; 0 does not clip.
        kernel: "torch" (fused AdamW, nothing to compile), "deepspeed" (DeepSpeedCPUAdam for states
            offloaded to cpu or nvme: AVX, compiled on first use) or "auto" (deepspeed where it
            applies on a GPU machine, else torch).
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    kernel: Literal["auto", "torch", "deepspeed"] = "auto"

    def validate(self) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        if self.kernel not in ("auto", "torch", "deepspeed"):
            raise ValueError(
                f"engine.optimizer.kernel {self.kernel!r} is none of auto, torch, deepspeed"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"engine.optimizer.betas {self.betas} must lie in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"engine.optimizer.eps {self.eps} must be above 0: a weight whose gradients are "
                "all 0 would become 0 / 0"
            )
        for key in ("lr", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(
                    f"engine.optimizer.{key} {getattr(self, key)} must be finite and not negative"
                )
        if not self.clip >= 0:
            raise ValueError(f"engine.optimizer.clip {self.clip} must not be negative")


@dataclass
class OffloadConfig:
    """Where partitions stay when they are not in use.

    Attributes:
        optimizer: optimizer states and fp32 master weights: "none" (on the device), "cpu" (host
            memory, stepped there) or "nvme" (disk, stepped on the host piece by piece).
        params: partitions of the weights in the compute type: "none", "cpu" or "nvme".
        nvme_path: folder on a local disk of every machine; each run gets a sub-folder, emptied at
            its start (swap files are no checkpoints).
        params_buffers: with params on nvme, partitions in host memory at a time.
        params_buffer_numel: elements of each of those buffers, at least the largest partition.
    """

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    params: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str = ""
    params_buffers: int = 16
    params_buffer_numel: int = 32_000_000

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is swapped to disk."""
        return "nvme" in (self.optimizer, self.params)

    def validate(self) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        for key in ("optimizer", "params"):
            if getattr(self, key) not in ("none", "cpu", "nvme"):
                raise ValueError(
                    f"engine.offload.{key} {getattr(self, key)!r} is none of none, cpu, nvme"
                )
        if self.uses_nvme and not self.nvme_path:
            raise ValueError(
                "offload to nvme needs engine.offload.nvme_path, a folder on a local disk"
            )
        for key in ("params_buffers", "params_buffer_numel"):
            if getattr(self, key) < 1:
                raise ValueError(f"engine.offload.{key} {getattr(self, key)} must be at least 1")


@dataclass
class ZeroConfig:
    """Tuning of ZeRO-3; none of it changes what is computed, up to the order of sums.

    Attributes:
        reduce_bucket_size: gradient elements that are reduced together.
        prefetch_bucket_size: weight elements that are gathered ahead of use.
        param_persistence_threshold: weights of at most so many elements stay gathered.
        max_live_parameters: weight elements that may be gathered at a time.
        max_reuse_distance: weights used again within so many elements stay gathered.
        sub_group_size: optimizer elements of a rank that are stepped (and swapped) at a time.
        overlap_comm: reduce gradients on a stream of their own, beside the backward pass.
        reduce_dtype: type in which gradients are summed over ranks; "bf16" halves the traffic and
            loses precision as ranks are added.
        resident_gib: weights stay whole on every rank, gathered once per step instead of layer by
            layer in every pass, when all of them in the compute type take at most so many GiB
            (2^30 bytes); on one rank they stay whatever they take. 0 never keeps them. Nothing may
            be offloaded; the gather, bucket and persistence settings above then have no effect.
    """

    reduce_bucket_size: int = 100_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool = True
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    resident_gib: float = 8.0

    def keeps_resident(self, numel: int, dtype: torch.dtype, world: int) -> bool:
        """Whether `numel` weights of a compute type stay whole on `world` ranks."""
        if self.resident_gib == 0:
            return False
        return world == 1 or numel * dtype.itemsize <= self.resident_gib * 2**30

    def validate(self) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        if self.reduce_dtype not in ("fp32", "bf16"):
            raise ValueError(
                f"engine.zero.reduce_dtype {self.reduce_dtype!r} is none of fp32, bf16"
            )
        for key in ("reduce_bucket_size", "sub_group_size", "max_live_parameters"):
            if getattr(self, key) < 1:
                raise ValueError(f"engine.zero.{key} {getattr(self, key)} must be positive")
        for key in ("prefetch_bucket_size", "param_persistence_threshold", "max_reuse_distance"):
            if getattr(self, key) < 0:
                raise ValueError(f"engine.zero.{key} {getattr(self, key)} must not be negative")
        if not self.resident_gib >= 0:
            raise ValueError(f"engine.zero.resident_gib {self.resident_gib} must not be negative")


@dataclass
class EngineConfig:
    """How the model is trained across ranks.

    Attributes:
        precision: compute type; "auto" is bf16 on GPUs and fp32 on the CPU. Master weights and
            optimizer states are fp32 always.
        accumulation: micro-batches per optimizer step. Their gradients are summed, not averaged:
            the loss that goes into backward is scaled for the whole step.
        optimizer: AdamW.
        schedule: learning rate over the run.
        offload: host memory and disks.
        zero: tuning.
    """

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    accumulation: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    def keeps_resident(self, numel: int, dtype: torch.dtype, world: int) -> bool:
        """Whether the weights stay whole on every rank (`zero.resident_gib`)."""
        offloaded = self.offload.optimizer != "none" or self.offload.params != "none"
        return not offloaded and self.zero.keeps_resident(numel, dtype, world)

    def validate(self, total_steps: int) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"engine.precision {self.precision!r} is none of auto, bf16, fp32")
        if self.accumulation < 1:
            raise ValueError(f"engine.accumulation {self.accumulation} must be at least 1")
        self.optimizer.validate()
        self.schedule.validate(total_steps)
        self.offload.validate()
        self.zero.validate()

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the compute type on this device."""
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def reduce_dtype(self, device: torch.device) -> torch.dtype:
        """Return the type in which gradients are summed over ranks on this device."""
        if self.dtype(device) == torch.float32 or self.zero.reduce_dtype == "fp32":
            return torch.float32
        return torch.bfloat16
