"""What a command prints besides a run's own output."""

from __future__ import annotations

import os


def report_error(message: str, *, everywhere: bool = False) -> None:
    """To standard error: by the first process alone when all meet the same fault, by each one when `everywhere`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not everywhere:
        return
    from glm_training.utils.console import Console

    Console().error(message if rank == "0" else f"[rank {rank}] {message}")
