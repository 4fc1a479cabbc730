"""Building what ZeRO-3 needs: DeepSpeed's configuration, the partitioned model, the optimizer."""

from __future__ import annotations

import fcntl
import importlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.deepspeed_env import compile_op
from parallel.engine_config import EngineConfig
from parallel.mesh import Mesh

SWAP_MINIMUM_BYTES = 1024**2
"""Partitions below this size stay in host memory under NVMe offload (DeepSpeed's MIN_AIO_BYTES)."""


class EngineError(RuntimeError):
    """The engine cannot be built, stepped or restored as asked; the message says what to change."""


def deepspeed_config(
    cfg: EngineConfig, dtype: torch.dtype, device: torch.device, swap: Path, numel: int | None
) -> dict[str, Any]:
    """Return DeepSpeed's JSON configuration.

    Args:
        cfg: validated engine configuration.
        dtype: compute type, bf16 or fp32.
        device: where this rank computes.
        swap: this run's folder for swap files.
        numel: elements of the whole model, which bound the reduction bucket; None when unknown.
    """
    zero, offload = cfg.zero, cfg.offload
    pin = device.type == "cuda"
    bucket = zero.reduce_bucket_size if numel is None else min(zero.reduce_bucket_size, numel)
    optimization: dict[str, Any] = {
        "stage": 3,
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        "sub_group_size": zero.sub_group_size,
        "overlap_comm": zero.overlap_comm,
    }
    if offload.optimizer != "none":
        optimization["offload_optimizer"] = {"device": offload.optimizer, "pin_memory": pin}
        if offload.optimizer == "nvme":
            optimization["offload_optimizer"]["nvme_path"] = str(swap)
    if offload.params != "none":
        optimization["offload_param"] = {"device": offload.params, "pin_memory": pin}
        if offload.params == "nvme":
            # max_in_cpu would keep the first billion weights in memory, whatever was asked for.
            optimization["offload_param"] |= {
                "nvme_path": str(swap),
                "max_in_cpu": 0,
                "buffer_count": offload.params_buffers,
                "buffer_size": offload.params_buffer_numel,
            }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cfg.accumulation,
        "gradient_clipping": cfg.optimizer.clip,
        "steps_per_print": None,
        # Its clock waits for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": optimization,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = zero.reduce_dtype
    return config


def prepare_swap_folder(cfg: EngineConfig, run: str, mesh: Mesh) -> tuple[Path, IO[str] | None]:
    """Empty this run's swap folder on every machine; does nothing without NVMe offload.

    Returns:
        The folder, and on one rank of each machine a file that keeps it locked while open.

    Raises:
        EngineError: another live run uses the folder, or it cannot be made.
    """
    folder = Path(cfg.offload.nvme_path) / f"tiny-onn-{run}"
    if not cfg.offload.uses_nvme:
        return folder, None
    lock, problem = None, ""
    if mesh.local_rank == 0:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(folder.name + ".lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        except BlockingIOError:
            problem = (
                f"rank {mesh.rank}: swap folder {folder} is in use by another process; give the "
                "runs different names, or offload.nvme_path different folders"
            )
        except OSError as e:
            problem = f"rank {mesh.rank}: offload.nvme_path: {e}"
    problems: list[Any] = [None] * mesh.world
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise EngineError("\n".join(text for text in problems if text))
    return folder, lock


def build_partitioned(
    deepspeed: ModuleType,
    build_model: Callable[[], nn.Module],
    cfg: EngineConfig,
    config: dict[str, Any],
    dtype: torch.dtype,
    mesh: Mesh,
) -> nn.Module:
    """Build the model so that every module is partitioned as soon as it is constructed.

    Weights are drawn in fp32 from the global generator, and rank 0's are broadcast, so they do not
    depend on the world size. Then parameters take the compute type; buffers keep theirs.

    A module class with the attribute `gathered_whole = True` has its parameters, and those of all
    modules inside it, gathered and released together, once per forward and backward: DeepSpeed's
    hooks cost the host as much as a small kernel per module, so a block should have them once.

    Raises:
        EngineError: a parameter is frozen, 0-dimensional or too large for the swap buffers.
    """
    overrides = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    init = deepspeed.zero.Init(
        config_dict_or_path=config,
        # By default it would turn every tensor made in a constructor to bf16, buffers included.
        tensor_overrides=[overrides.DeepSpeedTensorOverride.device],
    )
    partition_module = init._post_init_method

    def cast_and_partition(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "ds_id"):
                continue
            if not parameter.requires_grad:
                raise EngineError(
                    f"parameter '{name}' of {type(module).__name__} does not require a gradient: "
                    "make it a buffer (ZeRO-3 would keep no state for it)"
                )
            if parameter.ndim == 0:
                raise EngineError(
                    f"parameter '{name}' of {type(module).__name__} is 0-dimensional, which "
                    "DeepSpeed cannot partition: give it shape (1,)"
                )
            needed = math.ceil(parameter.numel() / mesh.world)
            if cfg.offload.params == "nvme" and needed > cfg.offload.params_buffer_numel:
                raise EngineError(
                    f"parameter '{name}' of {type(module).__name__} has partitions of {needed} "
                    "elements: raise offload.params_buffer_numel (now "
                    f"{cfg.offload.params_buffer_numel}) to at least that"
                )
            parameter.data = parameter.data.to(dtype)
        partition_module(module)

    init._post_init_method = cast_and_partition
    with init:
        module = build_model()
    for child in module.modules():
        if getattr(child, "gathered_whole", False):
            deepspeed.utils.set_z3_leaf_module(child, True)
    # Buffers that a constructor did not build through torch's factories are still on the host.
    for buffer in module.buffers():
        buffer.data = buffer.data.to(mesh.device)
    _check_swap_buffers(module, cfg, dtype)
    return module


def plain_linear() -> None:
    """Give `torch.nn.functional.linear` back, which `zero.Init` replaces in the whole process.

    DeepSpeed's is an autograd function in Python that does not keep the gathered weight alive until
    the backward pass. Where weights stay whole anyway it only costs time: about as much host time
    as the product's three launches together. An engine built later with partitioned weights puts
    DeepSpeed's back.
    """
    overrides = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    original = getattr(overrides.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        functional: Any = nn.functional
        functional.linear = original


def _check_swap_buffers(module: nn.Module, cfg: EngineConfig, dtype: torch.dtype) -> None:
    if cfg.offload.params != "nvme":
        return
    for name, child in module.named_modules():
        owned: list[Any] = list(child.parameters(recurse=False))
        swapped = [p for p in owned if p.ds_tensor.ds_numel * dtype.itemsize >= SWAP_MINIMUM_BYTES]
        if len(swapped) > cfg.offload.params_buffers:
            raise EngineError(
                f"module '{name}' holds {len(swapped)} parameters that live on nvme: raise "
                f"offload.params_buffers (now {cfg.offload.params_buffers}) to at least that"
            )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters by weight decay and learning-rate multiplier.

    Only matrices decay: tensors of two or more dimensions that are neither an nn.Embedding's nor
    marked `no_decay = True` on the Parameter by the module that owns it (gates, tables, input
    embeddings). `lr_multiplier = 0.1` on a Parameter scales its learning rate. Marks of a shared
    parameter count wherever they were set.
    """
    embeddings = {
        id(p)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
        for p in child.parameters(recurse=False)
    }
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        decays = (
            len(_full_shape(parameter)) >= 2
            and not getattr(parameter, "no_decay", False)
            and id(parameter) not in embeddings
        )
        multiplier = float(getattr(parameter, "lr_multiplier", 1.0))
        groups.setdefault((decays, multiplier), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_multiplier": multiplier,
        }
        for (decays, multiplier), parameters in sorted(groups.items(), reverse=True)
    ]


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    # A partitioned parameter's own shape is (0,).
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def build_optimizer(
    groups: list[dict[str, Any]], cfg: EngineConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW over the groups, with the kernel that the configuration asks for.

    Raises:
        EngineError: `kernel: deepspeed` without offloaded optimizer states.
    """
    options = cfg.optimizer
    offloaded = cfg.offload.optimizer != "none"
    if options.kernel == "deepspeed" and not offloaded:
        raise EngineError(
            "optimizer.kernel deepspeed is a CPU kernel: it needs offload.optimizer cpu or nvme; "
            "for states on the device, torch's fused AdamW (kernel torch) is as fast"
        )
    arguments: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if offloaded and (
        options.kernel == "deepspeed" or (options.kernel == "auto" and device.type == "cuda")
    ):
        compile_op("CPUAdamBuilder", "cpu_adam")
        cpu_adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        built: torch.optim.Optimizer = cpu_adam(groups, adamw_mode=True, **arguments)
        return built
    return torch.optim.AdamW(groups, fused=True, **arguments)


def keep_gradients_in_memory(zero: Any) -> None:
    """Keep DeepSpeed from sending gradients to disk under `offload.optimizer: nvme`.

    It would write each parameter's gradient, then read it straight into the middle of a sub-group's
    buffer. Where that address is not aligned for O_DIRECT, which is the rule, other numbers arrive,
    without an error. The gradients are in host memory all the time anyway
    (`grad_partitions_flat_buffer`), so that nothing is saved by the detour.

    Args:
        zero: DeepSpeedZeroOptimizer_Stage3 with an optimizer swapper.
    """
    swapper = zero.optimizer_swapper
    sizes = zero.fp16_partitioned_groups_flat_numel
    starts = {
        swapper.parameter_id(flat): sum(sizes[:i])
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat)
    }

    def swap_out_gradients(
        parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]
    ) -> None:
        key = swapper.parameter_id(parameter)
        # The host's view, as the tensors given may be on the device.
        swapper.swap_params_info[key].unswapped_gradients |= {
            offset: zero.grad_partitions_flat_buffer.narrow(0, starts[key] + offset, tensor.numel())
            for offset, tensor in zip(gradient_offsets, gradient_tensors, strict=True)
        }

    swapper.swap_out_gradients = swap_out_gradients
