"""``sessions.jsonl``: a line for each time that a run was started or resumed: where, with what, and how far it goes."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime
from importlib import metadata
from typing import Any

import torch

from glm_training import __version__
from glm_training.config import Config
from glm_training.utils.distributed import World
from glm_training.utils.failures import beside_training
from glm_training.utils.metrics_file import SESSIONS
from glm_training.utils.redaction import redact
from glm_training.utils.step_lines import StepLines, keep_until

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "numpy",
    "pillow",
)


def record_session(config: Config, world: World, step: int | None, total_steps: int) -> None:
    """Adds the line of a session that goes on after `step`, None for a start, and goes to `total_steps`; called on the
    main process. Lines of sessions that began later move aside, with the figures that they logged."""
    with beside_training(f"writing {SESSIONS}"):
        path = config.output_dir / SESSIONS
        keep_until(path, -1 if step is None else step)
        StepLines(path).append({"step": step or 0, "total_steps": total_steps} | _here(world))


def _here(world: World) -> dict[str, Any]:
    gpu = world.device.type == "cuda"
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {
        "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        "processes": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if gpu else str(world.device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {"glm_training": __version__, **versions} | ({"cuda": torch.version.cuda} if gpu else {}),
        "command": redact(shlex.join(sys.argv)),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
