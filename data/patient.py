"""Downloads that outlive an object store's bad minutes.

botocore retries a request a few times within seconds. A store that is restarted, or a network that
is mended, is away for longer: such failures are tried again with growing pauses until
`data.patience` seconds have passed. What trying again cannot mend (no such object, no permission)
fails at once.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.streaming_shim import CloudDownloader, S3Downloader

log = logging.getLogger(__name__)

FIRST_PAUSE = 1.0
"""Seconds before the second attempt; every further pause is twice as long."""

LONGEST_PAUSE = 20.0
"""Seconds between two attempts at most: a store that is back is not left waiting for minutes."""

CONNECT_TIMEOUT = 10.0
"""Seconds that a connection to the store may take."""

TIMEOUT = 60.0
"""Seconds without a byte after which an attempt has failed."""

LAST_TIMEOUT = 5.0
"""The least that an attempt is given when patience is about to end, in seconds."""


class TransientError(RuntimeError):
    """A failure that may be gone in a minute."""


def is_transient(error: BaseException) -> bool:
    """Tell failures of the store or of the way to it from those of the request."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", ""))
        return status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout")
    # botocore's own ConnectionError (refused, no answer, no such name, TLS) is not Python's.
    kinds = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, kinds) or (
        type(error).__name__ in ("ResponseStreamingError", "IncompleteReadError", "ProtocolError")
    )


class OneAttempt(S3Downloader):
    """Streaming's downloader from S3 without the attempts of the two libraries below it.

    Against a network that drops packets those multiply the minute after which one attempt fails,
    and the wait would outlast the patience that it was given.
    """

    def _create_s3_client(self, unsigned: bool = False, timeout: float = TIMEOUT) -> None:
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        config = Config(
            connect_timeout=min(CONNECT_TIMEOUT, timeout),
            read_timeout=timeout,
            retries={"total_max_attempts": 1, "mode": "standard"},
            signature_version=UNSIGNED if unsigned else None,
        )
        client: Any = Session().client(
            "s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL")
        )
        download_file = client.download_file

        def once(*words: Any, Config: Any, **options: Any) -> None:
            Config.num_download_attempts = 1
            download_file(*words, Config=Config, **options)

        client.download_file = once
        self._s3_client = client


class PatientDownloader:
    """One of streaming's downloaders, that does not give up at once."""

    def __init__(self, inner: Any, patience: float) -> None:
        """Try transient failures of `inner` again until `patience` seconds have passed."""
        self._inner = inner
        self._patience = patience
        self._waiting = threading.local()

    @contextmanager
    def waiting_since(self, start: float) -> Iterator[None]:
        """Count the patience of this thread's downloads from a moment of `time.monotonic`.

        A file that somebody else has tried in vain to fetch all that time is not waited for again.
        """
        self._waiting.since = start
        try:
            yield
        finally:
            del self._waiting.since

    def download(self, remote: str | None, local: str, timeout: float = TIMEOUT) -> None:
        """Fetch a file.

        Raises:
            TransientError: the store failed or was away all that time.
            Exception: another error of the downloader, at once.
        """
        start = getattr(self._waiting, "since", time.monotonic())
        pause = FIRST_PAUSE
        while True:
            left = self._patience - (time.monotonic() - start)
            try:
                self._inner.download(remote, local, min(timeout, max(left, LAST_TIMEOUT)))
                return
            except Exception as e:
                if not is_transient(e):
                    raise
                # The next attempt opens a new connection.
                self.clean_up()
                away = time.monotonic() - start
                if left <= 0:
                    # This attempt was the last one, begun when patience had ended.
                    raise TransientError(
                        f"{e} (tried for {away:.0f} s; data.patience is {self._patience:.0f} s)"
                    ) from e
                log.warning("%s: %s (for %.0f s; trying again)", remote, e, away)
            # Not all ranks at once.
            wait = pause * random.uniform(1.0, 1.5)
            time.sleep(min(wait, max(self._patience - away, 0.0)))
            pause = min(2 * pause, LONGEST_PAUSE)

    def clean_up(self) -> None:
        """Close the connection; the next attempt opens a new one."""
        self._inner.clean_up()


def downloader(address: str | None, patience: float) -> PatientDownloader:
    """Return a downloader for an address; without patience the libraries' own attempts stay."""
    inner = CloudDownloader.get(address)
    if patience and isinstance(inner, S3Downloader):
        inner = OneAttempt()  # type: ignore[no-untyped-call]
    return PatientDownloader(inner, patience)
