"""What tests ask of other processes."""

from __future__ import annotations

import psutil


def ended(process: psutil.Process) -> bool:
    """Whether a process runs no more.

    One whose parent has gone may stay a zombie: not every container has an init that takes it.
    """
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
