"""The training engine: DeepSpeed ZeRO-3 around a model, plus tables that live outside of it.

    engine = Engine(lambda: Model(cfg), EngineConfig(...), mesh, total_steps, tables)
    for each micro-batch:
        output = engine.forward(...)        # gathers weights module by module
        engine.backward(output.loss)        # gradients are averaged over ranks, summed over these
        result = engine.step()              # a StepResult after the last micro-batch, else None

One decision covers everything: the global gradient norm spans the dense weights and the tables, one
coefficient clips both, and a norm that is not finite skips both, on all ranks alike.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.transfer import to_device
from parallel.deepspeed_env import load_deepspeed, require_async_io
from parallel.engine_config import EngineConfig, OffloadConfig, OptimizerConfig, ZeroConfig
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh
from parallel.resident import ResidentWeights, no_gradient
from parallel.schedule import ScheduleConfig, learning_rate_factor
from parallel.tensor_file import TensorSource
from parallel.zero_setup import (
    EngineError,
    build_optimizer,
    build_partitioned,
    deepspeed_config,
    keep_gradients_in_memory,
    parameter_groups,
    plain_linear,
    prepare_swap_folder,
)
from parallel.zero_state import DenseState, Shards

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "OffloadConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "StepResult",
    "Table",
    "ZeroConfig",
]


class Table(Protocol):
    """Parameters outside the module that are clipped, stepped and skipped with it."""

    def grad_sq_norm(self) -> Tensor:
        """Return the squared gradient norm over all ranks, 0-dim; a collective."""

    def step(self, lr: float, clip_coefficient: float) -> None:
        """Apply the gradients, scaled by the coefficient.

        Args:
            lr: the schedule's rate of this step; a multiplier of its own is the table's to apply.
            clip_coefficient: at most 1.
        """

    def skip(self) -> None:
        """Forget the gradients of this step."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: global gradient norm before clipping, tables included; inf when not finite.
        lr: learning rate of the schedule (of a group with multiplier 1).
        skipped: the norm was not finite, or the step not accepted, so that nothing moved: neither
            weights, tables, optimizer states nor the schedule.
    """

    grad_norm: float
    lr: float
    skipped: bool


class Engine:
    """One rank of a model that is partitioned over all ranks."""

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        cfg: EngineConfig,
        mesh: Mesh,
        total_steps: int,
        tables: Sequence[Table] = (),
        *,
        run: str = "run",
    ) -> None:
        """Build and partition the model; on all ranks together.

        Args:
            build_model: constructs the module, initialising every weight where it creates it,
                from the global generator (rank 0's draws are everyone's).
            cfg: configuration.
            mesh: from `init_mesh()`.
            total_steps: optimizer steps of the run, for the schedule.
            tables: stepped with the module.
            run: names the run's sub-folder of `offload.nvme_path`; one at a time may use it.

        Raises:
            ValueError: a configured value cannot be meant.
            EngineError: the model cannot be partitioned as configured.
            DeepSpeedError: an op that the configuration needs cannot be built here.
        """
        cfg.validate(total_steps)
        self.cfg, self.mesh, self.total_steps, self.tables = cfg, mesh, total_steps, tuple(tables)
        self.device, self.dtype = mesh.device, cfg.dtype(mesh.device)
        self.applied_steps = 0
        self.skipped_steps = 0
        deepspeed = load_deepspeed(mesh)
        if cfg.offload.uses_nvme:
            require_async_io(deepspeed)
        # The lock lasts until the engine is closed, or its process ends.
        swap, self._swap_lock = prepare_swap_folder(cfg, run, mesh)
        config = deepspeed_config(cfg, self.dtype, self.device, swap, None)
        self.module = build_partitioned(deepspeed, build_model, cfg, config, self.dtype, mesh)
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        numel = sum(p.ds_numel for p in parameters.values())
        groups = parameter_groups(self.module, cfg.optimizer.weight_decay)
        resident = cfg.keeps_resident(numel, self.dtype, mesh.world)
        # Buckets of its own are then of no use.
        bucket = 1 if resident else numel
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=build_optimizer(groups, cfg, self.device),
            config=deepspeed_config(cfg, self.dtype, self.device, swap, bucket),
        )
        self._zero = self._deepspeed.optimizer
        self.resident: ResidentWeights | None = None
        if resident:
            plain_linear()
            self.resident = ResidentWeights(self._deepspeed, mesh, cfg.reduce_dtype(self.device))
        if cfg.offload.optimizer == "nvme":
            keep_gradients_in_memory(self._zero)
        self._state = DenseState(
            self.module,
            self._zero,
            mesh.rank,
            mesh.world,
            None if self.resident is None else self.resident.gather,
        )
        self._held_ids = {
            p.ds_id: name
            for name, p in parameters.items()
            if p.partition_numel() * mesh.rank < p.ds_numel
        }
        self._micro_batch = 0
        self._tables_wait = False
        self._norm = 0.0
        self._accept: Callable[[float], bool] | None = None
        self._join_norms()

    def close(self) -> None:
        """Give the run's swap folder free; with NVMe offload the engine is of no use afterwards."""
        if self._swap_lock is not None:
            self._swap_lock.close()

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step."""
        cfg = self.cfg
        factor = learning_rate_factor(cfg.schedule, self.applied_steps, self.total_steps)
        return cfg.optimizer.lr * factor

    def forward(self, *args: Any) -> Any:
        """Run the module; weights are gathered as its sub-modules are called."""
        return self._deepspeed(*args)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of a micro-batch's 0-dim loss.

        Gradients are averaged over ranks and summed over micro-batches; the loss is not scaled.

        Raises:
            EngineError: a parameter got no gradient.
        """
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if self._micro_batch == 0 and self.resident is None:
            # DeepSpeed would apply the gradient that the parameter had in an earlier step.
            idle = self._held_ids.keys() - self._zero._offload_boundary_param_ids
            if idle:
                names = sorted(self._held_ids[i] for i in idle)
                raise EngineError(no_gradient(self.mesh.rank, names))

    def step(self, accept: Callable[[float], bool] | None = None) -> StepResult | None:
        """End a micro-batch; after the last of `accumulation`, step weights and tables.

        Args:
            accept: is given the global gradient norm and says whether the step is applied; must
                answer alike on all ranks. A norm that is not finite never is.

        Returns:
            What the optimizer step did, or None between micro-batches.
        """
        self._micro_batch += 1
        if self._micro_batch < self.cfg.accumulation:
            self._deepspeed.step()
            return None
        self._micro_batch = 0
        lr = self.lr
        self._tables_wait = True
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._accept = accept
        self._deepspeed.step()
        norm, skipped = self._norm, bool(self._zero.overflow)
        if self.resident is not None:
            self.resident.begin_step()
            if not skipped:
                self.resident.gather()
        if skipped:
            self.skipped_steps += 1
            for table in self.tables:
                table.skip()
        else:
            if self._tables_wait:
                raise EngineError("DeepSpeed stepped without unscaling: the tables were left out")
            self.applied_steps += 1
        return StepResult(norm, lr, skipped)

    def _clip_coefficient(self, norm: float) -> float:
        clip = self.cfg.optimizer.clip
        return 1.0 / max((norm + 1e-6) / clip, 1.0) if clip > 0 else 1.0

    def _join_norms(self) -> None:
        """Make the tables' gradient norm part of the one that DeepSpeed clips and judges by.

        A step that is not accepted gets a norm that DeepSpeed discards steps for. Once it is, the
        tables step first: their host's work runs beside the dense step.
        """
        unscale = self._zero.unscale_and_clip_grads
        dense_norms = self._zero._get_norm_groups if self.resident is None else self.resident.norms
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups

        def norms() -> list[Tensor]:
            groups: list[Tensor] = dense_norms()
            for table in self.tables:
                norm = table.grad_sq_norm().sqrt()
                groups.append(to_device(norm, groups[0].device).to(groups[0].dtype))
            # The step's one wait for the device.
            self._norm = float(combine(groups))
            if self._accept is not None and not self._accept(self._norm):
                groups.append(torch.full_like(groups[0], math.inf))
            return groups

        def step_tables_and_unscale(sub_group_id: int, total_norm: Tensor) -> None:
            if self._tables_wait:
                self._tables_wait = False
                coefficient = self._clip_coefficient(self._norm)
                for table in self.tables:
                    table.step(self.lr, coefficient)
            unscale(sub_group_id, total_norm)

        self._zero._get_norm_groups = norms
        self._zero.unscale_and_clip_grads = step_tables_and_unscale

    def snapshot(self, buffers: HostBuffers | None) -> tuple[TensorSource, dict[str, Any]]:
        """Return this rank's dense state as of the last step, for every offload mode.

        Args:
            buffers: take copies in host memory, whole after `buffers.wait()`; with None the source
                reads the live state, to be done before the next step.

        Returns:
            (tensors, meta): fp32 master, first and second moment of this rank's part of every
            parameter, and the module's persistent buffers; JSON-able step counters and shapes.

        Raises:
            EngineError: called between the micro-batches of a step.
        """
        if self._micro_batch:
            raise EngineError(
                f"state asked for after micro-batch {self._micro_batch} of "
                f"{self.cfg.accumulation}: gradients are no part of it; wait for the step's end"
            )
        source, meta = self._state.snapshot(buffers)
        steps = {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps}
        return source, meta | steps

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that the copies of a snapshot take, about."""
        return self._state.nbytes

    def rewrite(self, changes: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        """Replace parts of parameters, their masters and moments between steps; on all ranks.

        Args:
            changes: parameter name to (first element of the flattened parameter, fp32 values), the
                same on every rank.

        Raises:
            EngineError: no such parameter, or elements beyond its end.
        """
        self._state.rewrite(changes)

    def local_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy this rank's dense state to host memory; see `snapshot`."""
        source, meta = self.snapshot(None)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in source}, meta

    def load_local_state(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        shards: Shards | None = None,
    ) -> None:
        """Put a saved dense state in place; on all ranks together, under any offload mode.

        Args:
            tensors: this rank's; when the number of ranks changed, any saved rank's.
            meta: what was saved with `tensors`.
            shards: gives the tensors of any saved rank; needed when the number of ranks changed.

        Raises:
            EngineError: another model's state, or other ranks' without `shards`.
        """
        self._state.restore(tensors, meta, shards)
        self.applied_steps = int(meta["applied_steps"])
        self.skipped_steps = int(meta["skipped_steps"])
