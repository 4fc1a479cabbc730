"""The training loop: next batch, forward, backward, step, record, checkpoint, stop.

`Trainer` drives one rank's share of a run. Everything it uses is a component with a room of its
own; this file says in which order they act.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NoReturn

import torch
import torch.distributed as dist

from data.index import DataError
from data.loader import Batch
from kernels.transfer import to_device
from launcher.components import active_flops, build, open_metrics
from launcher.config import RunConfig
from launcher.evaluate import text_sample, validate
from launcher.flops import mfu
from launcher.lifecycle import RunFolder
from launcher.metrics import StepRecord, memory_bytes, recording
from launcher.resume import restore, save
from launcher.rollback import roll_back
from launcher.spikes import SpikeError
from launcher.stragglers import Stragglers
from launcher.trace import Trace
from parallel.engine import StepResult
from tiny_onn.dynmoe import update_controllers


class StepTimer:
    """Wall seconds of the parts of a step as the host sees them, by name.

    On a GPU the host runs ahead of the kernels; the parts then say where the host waited, and only
    their sum is the time of the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.started


class Trainer:
    """One rank of a run, from the newest checkpoint to the end or to a request to stop."""

    def __init__(self, cfg: RunConfig, folder: RunFolder) -> None:
        """Build every component and go on from the newest verified checkpoint, if there is one."""
        self.cfg = cfg
        self.c = build(cfg, folder)
        restore(self.c)
        open_metrics(self.c)
        self.flops = active_flops(cfg)
        at = cfg.train.trace_at if self.c.mesh.is_first else 0
        self.trace = Trace(folder.root / "traces", at, cfg.train.trace_steps, self.c.mesh.device)
        self.checkpoint_seconds = 0.0
        self.saved = self.c.step
        self.stragglers = Stragglers(self.c.engine.module, self.c.mesh)

    def train(self) -> Literal["done", "stopped"]:
        """Train to the last step, or until asked to stop; either way a checkpoint is left."""
        cfg, c = self.cfg.train, self.c
        if 0 < c.step < cfg.steps and self._due(cfg.evaluate_every):
            # Held-out data that could not be read ended the run before it had its numbers.
            self._validate(cfg.evaluate_sequences)
        while c.step < cfg.steps:
            self.trace.step(c.step)
            timer = StepTimer()
            with timer("data"):
                batches, labels, label_bytes = self._next_step()
            with recording(c.engine.module, self._due(cfg.stats_every, c.step + 1)) as stats:
                loss, tables, result = self._forward_backward_step(batches, labels, timer)
            update_controllers(c.engine.module, c.engine.rewrite, skipped=result.skipped)
            c.step += 1
            c.tokens += cfg.global_batch * self.cfg.data.seq_len
            bits = loss * labels / math.log(2) / max(label_bytes, 1)
            record = self._record(loss, bits, tables, result, timer, batches)
            c.metrics.step(record, stats)
            c.watchdog.beat(c.step)
            if result.skipped and c.spikes.run_of_spikes:
                self._roll_back()
                continue
            if self._due(cfg.evaluate_every) and c.step < cfg.steps:
                self._validate(cfg.evaluate_sequences)
            if self._due(cfg.sample_every):
                c.metrics.text(c.step, text_sample(c, cfg.sample_prompt, cfg.sample_tokens))
            stop = c.stop.requested(c.step)
            if stop or self._due(self.cfg.checkpoint.every) or c.step == cfg.steps:
                self._save()
            if stop and c.step < cfg.steps:
                c.metrics.note(f"stopped after step {c.step}: {stop.text}")
                self.trace.close()
                self._finish_saving()
                return "stopped"
        self.trace.close()
        self._validate()
        self._finish_saving()
        return "done"

    def _forward_backward_step(
        self, batches: Sequence[Batch], labels: int, timer: StepTimer
    ) -> tuple[float, dict[str, float], StepResult]:
        """Run every micro-batch of a step.

        Returns:
            All ranks' loss in nats per label, their tables' numbers by name, what the step did.
        """
        c, device = self.c, self.c.engine.device
        # Gradients are summed over micro-batches and averaged over ranks: scaled like this they are
        # those of the mean over every label of the global batch, however the labels are spread.
        scale = torch.full((), c.mesh.world / labels, device=device)
        nll_sum = torch.zeros((), device=device)
        sums = nll_sum.double()[None]
        result: StepResult | None = None
        loss = math.nan
        counts: dict[str, int] = {}

        def accept(norm: float) -> bool:
            nonlocal loss
            loss = sums[0].item() / labels
            return c.spikes.accept(c.step + 1, loss, norm)

        for i, batch in enumerate(batches):
            with timer("tables"):
                rows = c.fetch_rows(batch.ids_T)
                if c.table is not None:
                    coming = [*batches[i + 1 : i + 2]] or c.loader.peek_step()
                    c.table.prefetch(coming[0].ids_T)
            with timer("forward"):
                output = c.forward(batch, rows, scale)
            with timer("backward"):
                c.engine.backward(output.loss)
            with timer("tables"):
                if c.table is not None and rows is not None:
                    c.table.accumulate(rows)
            nll_sum += output.nll_sum
            with timer("optimizer"):
                if batch is batches[-1]:
                    counts = {} if c.table is None else c.table.step_numbers()
                    numbers = torch.tensor([*counts.values()], dtype=torch.float64)
                    numbers = to_device(numbers, device)
                    sums = torch.cat((nll_sum.double()[None], numbers))
                    dist.all_reduce(sums)
                result = c.engine.step(accept)
        assert result is not None, "the engine steps at the last micro-batch"
        return loss, dict(zip(counts, sums[1:].tolist(), strict=True)), result

    def _next_step(self) -> tuple[list[Batch], int, int]:
        """Return this rank's batches, and all ranks' labels and the bytes that they stand for.

        Raises:
            DataError: a rank cannot read its data; on all ranks, after a checkpoint.
        """
        self.stragglers.begin()
        cursor = self.c.loader.state_dict()
        batches: list[Batch] = []
        failure: DataError | None = None
        try:
            batches = self.c.loader.next_step()
        except DataError as e:
            failure = e
        counts = torch.tensor(
            [
                sum(b.n_labels for b in batches),
                sum(self.c.label_bytes(b.labels_T) for b in batches),
                int(failure is not None),
            ]
        )
        dist.all_reduce(counts)
        if counts[2]:
            # Ranks that could read theirs are a step ahead.
            self.c.loader.load_state_dict(cursor)
            self._stop_without_data(failure or DataError("another rank cannot read its data"))
        return batches, int(counts[0]), int(counts[1])

    def _validate(self, sequences: int = 0) -> None:
        """Record a validation, unless the run that was killed at this step has done so.

        Raises:
            DataError: a rank cannot read the held-out data; on all ranks, after a checkpoint.
        """
        c = self.c
        known = torch.tensor(int(c.metrics.validated(c.step)))
        dist.broadcast(known, src=0)
        if known:
            return
        try:
            result = validate(c, sequences)
        except DataError as e:
            self._stop_without_data(e)
        c.metrics.validation(c.step, result)

    def _stop_without_data(self, failure: DataError) -> NoReturn:
        c = self.c
        if c.step > self.saved:
            self._save()
        self._finish_saving()
        # The first rank that ends takes the others with it.
        dist.barrier()
        kept = f"; a checkpoint of step {c.step} is kept" if c.step else ""
        raise DataError(f"{failure}\nstopped after step {c.step}{kept}") from failure

    def _record(
        self,
        loss: float,
        bits_per_byte: float,
        tables: dict[str, float],
        result: StepResult,
        timer: StepTimer,
        batches: Sequence[Batch],
    ) -> StepRecord:
        c = self.c
        tokens_per_s = self.cfg.train.global_batch * self.cfg.data.seq_len / timer.total()
        event, c.event = c.event, None
        if result.skipped:
            behind = {} if event is None else {"behind": event}
            event = {"kind": "skipped", "reason": c.spikes.reason, **behind}
        checkpoint, self.checkpoint_seconds = self.checkpoint_seconds, 0.0
        shares = self.stragglers.shares(c.stop.heard())
        memory = memory_bytes(c.engine.device)
        c.stop.tell(self.stragglers.facts(timer.seconds["data"], timer.total(), memory))
        return StepRecord(
            step=c.step,
            loss=loss,
            bits_per_byte=bits_per_byte,
            lr=result.lr,
            tokens=c.tokens,
            tokens_per_s=tokens_per_s,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            sample_cursor=c.loader.data_step * self.cfg.train.global_batch,
            sample_ids=self._sample_ids(batches) if result.skipped else None,
            event=event,
            seconds={
                **timer.seconds,
                "checkpoint": checkpoint,
                "checkpoint_write": c.store.written_seconds(),
            },
            memory_bytes=memory,
            mfu=mfu(tokens_per_s, self.flops, c.engine.device, c.mesh.world),
            tables=tables,
            extra=shares,
        )

    def _due(self, every: int, step: int | None = None) -> bool:
        return every > 0 and (self.c.step if step is None else step) % every == 0

    def _sample_ids(self, batches: Sequence[Batch]) -> list[int]:
        """Return all ranks' samples of a step."""
        own = torch.tensor([i for batch in batches for i in batch.sample_ids])
        ids = [torch.empty_like(own) for _ in range(self.c.mesh.world)]
        dist.all_gather(ids, own)
        # Ranks that share a sequence have the same ones.
        return list(dict.fromkeys(torch.cat(ids).tolist()))

    def _roll_back(self) -> None:
        """Go back to the last good checkpoint; raises SpikeError when that does not help."""
        c, spikes = self.c, self.c.spikes.run_of_spikes
        try:
            window = roll_back(c, spikes)
            if window is None:
                if c.spikes.fruitless >= c.cfg.spikes.max_rollbacks:
                    raise SpikeError(
                        f"spikes at steps {spikes}, the last: {c.spikes.reason}; there is no "
                        "checkpoint before them"
                    )
                c.spikes.forget_run()
                c.metrics.note(f"spikes at steps {spikes} and no checkpoint before them")
                return
        except SpikeError as e:
            c.spikes.forget_run()
            c.metrics.event(c.step, {"kind": "gave_up", "reason": str(e), "spikes": spikes})
            self._save()
            self._finish_saving()
            message = (
                f"{e}. A checkpoint of step {c.step} is saved. {c.folder.root}/events.jsonl has "
                "the samples; go on with other spikes.* settings, or start anew with a smaller "
                "learning rate, a longer warm-up or other data"
            )
            c.folder.refuse(message)
            raise SpikeError(message) from None
        # Steps up to the newest checkpoint are to be trained, and saved, again.
        self.saved = c.step
        c.metrics.close()
        open_metrics(c)
        c.metrics.note(
            f"spikes at steps {window.spikes} ({window.reason}): back to step {window.step}, on "
            f"with the data behind step {window.from_step}"
        )
        c.watchdog.beat(c.step, "rollback")

    def _save(self) -> None:
        """Begin to write a checkpoint; raises CheckpointError when the one before failed."""
        start = time.perf_counter()
        save(self.c)
        self.saved = self.c.step
        self.checkpoint_seconds += time.perf_counter() - start
        self.c.watchdog.beat(self.c.step, "checkpoint")

    def _finish_saving(self) -> None:
        c = self.c
        c.store.wait(lambda: c.watchdog.beat(c.step, "checkpoint"))
        if seconds := c.store.written_seconds():
            c.metrics.note(
                f"checkpoint of step {c.step}: training waited {self.checkpoint_seconds:.3f} s for "
                f"the copy, writing took {seconds:.3f} s"
            )
