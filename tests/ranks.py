"""Run a function on several gloo ranks of this machine, for tests that need more than one process.

`run_ranks(fn, 2, a, b)` calls `fn(mesh, a, b)` in two fresh processes and returns their results in
rank order. `fn` must be a module-level function; arguments and results travel pickled.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(mesh, *args)` on `world` processes joined by gloo; return the results by rank.

    Every process has one OpenMP thread and torchrun's environment. The rendezvous store is served
    by the calling process on a port the kernel picks, so that runs side by side never collide.

    Raises:
        RankError: a rank raised (its traceback is in the message), ended without a result, or was
            not done after `timeout` seconds (all stacks go to stderr and every rank is killed).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=_rank_main, args=(sender, fn, args, timeout))
            # OpenMP reads its environment once, when the child first loads torch.
            with _environment(environment):
                process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.join(GRACE_SECONDS if all(not p.is_alive() for p in processes) else 0.2)
            if process.is_alive():
                process.kill()
                process.join()


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


def _rank_main(
    sender: Connection, fn: Callable[..., Any], args: Sequence[Any], timeout: float
) -> None:
    # Just before the caller gives up, so that a hang shows where every rank stands.
    faulthandler.dump_traceback_later(max(timeout - 2.0, 1.0))
    torch.set_num_threads(1)
    try:
        mesh = init_mesh()
        # Plain pickle copies tensors; multiprocessing's own would share memory that dies with us.
        payload = pickle.dumps((True, fn(mesh, *args)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # A failed rank must not wait for its peers in an exit handler.
        os._exit(1)
    sender.send_bytes(payload)
    sender.close()
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while open_pipes:
        ready = wait(list(open_pipes), max(deadline - time.monotonic(), 0.0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                passed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failures[rank] = "ended without a result (killed, or left by os._exit)"
            else:
                (results if passed else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankError("\n".join(f"rank {r}: {text}" for r, text in failures.items()))
    if open_pipes:
        raise RankError(f"ranks {sorted(open_pipes.values())} not done after {timeout:.0f} s")
    return [results[rank] for rank in range(len(pipes))]
