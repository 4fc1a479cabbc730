"""Tokenise documents in parallel processes, results in the order of the documents.

Each worker is a plain child process that reads texts from its input pipe and writes ids to its
output pipe. That is less than multiprocessing offers, on purpose: nothing is pickled, the parent's
main module is not imported again (it may load torch, seconds per worker), and when the parent dies,
even by `kill -9`, the workers see their input end and leave.

Wire format, little endian: a count n (uint32), n lengths (uint32), then the n items end to end:
UTF-8 bytes on the way in, int32 ids on the way out.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from data.tokenizer import Ids, Tokenizer

_COUNT = np.dtype("<u4")
_IDS = np.dtype("<i4")


class EncodePool:
    """Worker processes that share one tokenizer file; use as a context manager."""

    def __init__(self, tokenizer: Path, workers: int) -> None:
        """Start `workers` processes that load the model file `tokenizer`."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "data.encode_pool", str(tokenizer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
            for _ in range(workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        # One thread per process: it only waits on the pipes, the work is done elsewhere.
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> EncodePool:
        """Return the pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes."""
        if error is not None:
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def encode(self, batches: Iterable[Sequence[bytes]]) -> Iterator[list[Ids]]:
        """Yield the ids of each batch of UTF-8 texts, in order.

        Takes at most two batches per process from `batches` ahead of what has been consumed.

        Raises:
            RuntimeError: a worker ended; it has written why to standard error.
        """
        waiting: deque[Future[list[Ids]]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._encode, batch))
            if len(waiting) > 2 * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, batch: Sequence[bytes]) -> list[Ids]:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, [len(text) for text in batch], b"".join(batch))
            lengths = _receive_lengths(process.stdout)
            ids = np.frombuffer(_read(process.stdout, 4 * sum(lengths)), _IDS)
        except (EOFError, BrokenPipeError) as e:
            raise RuntimeError(
                f"a tokenizer process ended with code {process.wait()} (see its message above; "
                f"-9 means killed, often for lack of memory: use fewer --workers)"
            ) from e
        finally:
            # A dead one too: whoever gets it next fails at once, instead of waiting for ever.
            self._idle.put(process)
        return np.split(ids, np.cumsum(lengths)[:-1])


def _send(stream: IO[bytes], lengths: Sequence[int], body: bytes) -> None:
    head = np.array([len(lengths), *lengths], _COUNT).tobytes()
    stream.write(head + body)
    stream.flush()


def _receive_lengths(stream: IO[bytes]) -> list[int]:
    count = int(np.frombuffer(_read(stream, 4), _COUNT)[0])
    return [int(n) for n in np.frombuffer(_read(stream, 4 * count), _COUNT)]


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes")
    return data


def _serve(tokenizer: Tokenizer) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            lengths = _receive_lengths(source)
        except EOFError:
            return
        texts = [_read(source, n).decode() for n in lengths]
        ids = [tokenizer.encode(text) for text in texts]
        _send(sink, [len(i) for i in ids], b"".join(i.astype(_IDS).tobytes() for i in ids))


if __name__ == "__main__":
    _serve(Tokenizer.load(sys.argv[1]))
