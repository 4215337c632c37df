"""What a command prints besides a run's own output."""

from __future__ import annotations

import logging
import os


def hide_advice_on_cpu_kernels() -> None:
    """bitsandbytes, where it is installed, tells every program on some processors to install a package that computes
    4-bit layers on the CPU faster, whether it has such layers or not."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def hide_progress_bars() -> None:
    """Switches off the bars that transformers and diffusers draw for every file they load or write. Downloads of
    huggingface_hub keep theirs, unless HF_HUB_DISABLE_PROGRESS_BARS is set."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hidden = are_progress_bars_disabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # this one switches the hub's bars off as well
    if not hidden:
        enable_progress_bars()


def report_error(message: str, *, everywhere: bool = False) -> None:
    """To standard error: by the first process alone when all meet the same fault, by each one when `everywhere`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not everywhere:
        return
    from glm_training.utils.console import Console

    Console().error(message if rank == "0" else f"[rank {rank}] {message}")
