"""Downloads that outlive an object store's bad minutes.

botocore retries a request a few times within seconds. A store that is restarted, or a network that
is mended, is away for longer: such failures are tried again with growing pauses for
`data.patience` seconds. What trying again cannot mend (no such object, no permission) fails at
once.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from data.streaming_shim import CloudDownloader, retry

log = logging.getLogger(__name__)

FIRST_PAUSE = 1.0
"""Seconds before the second attempt; every further pause is twice as long."""

TIMEOUT = 60.0
"""Seconds without a byte after which an attempt has failed."""


class TransientError(RuntimeError):
    """A failure that may be gone in a minute."""


def is_transient(error: BaseException) -> bool:
    """Tell failures of the store or of the way to it from those of the request."""
    from botocore.exceptions import ClientError, HTTPClientError

    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", ""))
        return status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout")
    # Every failure of the connection is one of these, or one of the operating system's.
    return isinstance(error, HTTPClientError | ConnectionError | TimeoutError) or (
        type(error).__name__ in ("ResponseStreamingError", "IncompleteReadError", "ProtocolError")
    )


def attempts(patience: float) -> int:
    """Return how many attempts take at least `patience` seconds, by their pauses alone."""
    return 1 + math.ceil(math.log2(patience / FIRST_PAUSE + 1))


class PatientDownloader:
    """One of streaming's downloaders, that does not give up at once."""

    def __init__(self, inner: Any, patience: float) -> None:
        """Try transient failures of `inner` again for `patience` seconds."""
        self._inner = inner
        self._patience = patience

    def download(self, remote: str | None, local: str, timeout: float = TIMEOUT) -> None:
        """Fetch a file.

        Raises:
            TransientError: the store failed or was away all that time.
            Exception: another error of the downloader, at once.
        """
        start = time.monotonic()

        @retry(
            TransientError,
            clean_up_fn=self.clean_up,
            num_attempts=attempts(self._patience),
            initial_backoff=FIRST_PAUSE,
        )
        def attempt() -> None:
            try:
                self._inner.download(remote, local, timeout)
            except Exception as e:
                if not is_transient(e):
                    raise
                away = time.monotonic() - start
                log.warning("%s: %s (for %.0f s; trying again)", remote, e, away)
                raise TransientError(
                    f"{e} (tried for {away:.0f} s; data.patience is {self._patience:.0f} s)"
                ) from e

        attempt()

    def clean_up(self) -> None:
        """Close the connection; the next attempt opens a new one."""
        self._inner.clean_up()


def downloader(address: str | None, patience: float) -> PatientDownloader:
    """Return a downloader for an address."""
    return PatientDownloader(CloudDownloader.get(address), patience)
