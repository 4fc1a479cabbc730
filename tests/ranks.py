"""Run a function on several gloo ranks of this machine, for tests that need more than one process.

`run_ranks(fn, 2, a, b)` calls `fn(mesh, a, b)` in two fresh processes and returns their results in
rank order. `Ranks(2)` keeps the processes for several calls, which saves seconds per call. `fn`
must be a module-level function; arguments and results travel pickled.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import init_mesh

GRACE_SECONDS = 3.0
"""How long the peers of a failed rank may take to report a failure of their own."""


class RankError(RuntimeError):
    """A rank raised, died or hung; the message holds the tracebacks of all that reported one."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `fn(mesh, *args)` on `world` fresh processes joined by gloo; return the results by rank.

    Raises:
        RankError: a rank raised (its traceback is in the message), ended without a result, or was
            not done after `timeout` seconds (all stacks go to stderr and every rank is killed).
    """
    with Ranks(world) as ranks:
        return ranks.run(fn, *args, timeout=timeout)


class Ranks:
    """Processes with one OpenMP thread and torchrun's environment each, started at the first call.

    The rendezvous store is served by the calling process on a port the kernel picks, so that runs
    side by side never collide. After a failure the next call starts fresh processes.
    """

    def __init__(self, world: int, device: str = "cpu") -> None:
        """Describe `world` ranks on "cpu" or "cuda"; nothing is started yet."""
        self.world, self.device = world, device
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def __enter__(self) -> Ranks:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Call `fn(mesh, *args)` on every rank; return the results by rank; see `run_ranks`."""
        payload = pickle.dumps((fn, args, timeout))
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(payload)
            return self._collect(timeout)
        except BaseException:
            self.close(kill=True)
            raise

    def close(self, kill: bool = False) -> None:
        """End the processes, at once with `kill`."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if not kill:
                process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
            process.join()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        c10d: Any = dist
        self._store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }
            if self.device == "cpu":
                # Some of DeepSpeed puts weights on a GPU wherever it sees one.
                environment["CUDA_VISIBLE_DEVICES"] = ""
            process = context.Process(target=_serve, args=(theirs, self.device), daemon=True)
            # OpenMP reads its environment once, when the child first loads torch.
            with _environment(environment):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    passed, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    failures[rank] = "ended without a result (killed, or left by os._exit)"
                else:
                    (results if passed else failures)[rank] = value
                if failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise RankError("\n".join(f"rank {r}: {text}" for r, text in failures.items()))
        if waiting:
            raise RankError(f"ranks {sorted(waiting.values())} not done after {timeout:.0f} s")
        return [results[rank] for rank in range(self.world)]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _serve(pipe: Connection, device: str) -> None:
    """Answer calls until the caller closes the pipe."""
    torch.set_num_threads(1)
    mesh = None
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            # Not through exit handlers, which could wait for peers that are gone.
            os._exit(0)
        try:
            fn, args, timeout = pickle.loads(request)
            # Just before the caller gives up, so that a hang shows where every rank stands.
            faulthandler.dump_traceback_later(max(timeout - 2.0, 1.0))
            mesh = mesh or init_mesh(device)
            # Plain pickle copies tensors; multiprocessing's own would share memory that dies with
            # this process.
            answer = pickle.dumps((True, fn(mesh, *args)))
            # The caller may kill every rank once it has all answers.
            dist.barrier()
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(answer)
