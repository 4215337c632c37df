"""DMDR's documented output tree, laid over a run directory.

    args.json                           the resolved configuration
    log.txt                             -> train.log
    loss_logs/loss_gui_log.jsonl        a line per update of the guidance network
    loss_logs/loss_gen_log.jsonl        a line per update of the generator
    checkpoints/accelerator_1/step-N    -> checkpoints/step-N: generator, guidance network and both optimizers are one
    checkpoints/accelerator_2/step-N       checkpoint here
    checkpoints/torch_units/step-N.pt
    checkpoints/lora_gui/step-N         -> the guidance network's adapter in it
    checkpoints/lora_gen/step-N         -> the generator's, if it has one

Links are relative: the run directory can be moved. All of it lies beside the training: what cannot be written is told,
and the run goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from glm_training.config import Config
from glm_training.engine.errors import SettingsError
from glm_training.utils.failures import beside_training
from glm_training.utils.redaction import redact_values
from glm_training.utils.step_lines import StepLines, keep_until

Network = Literal["gen", "gui"]

_TO_CHECKPOINTS = f"..{os.sep}step-"

GUIDANCE_EXPORT = "lora_guidance"
"""Folder of a checkpoint that holds the guidance network's adapter."""


class OutputTree:
    """Called on the main process alone. `part` is the generator's name among the trained parts."""

    def __init__(self, config: Config, part: str) -> None:
        self._config = config
        self._run = config.output_dir
        self._checkpoints = config.checkpoint_dir()
        exports = {"lora_gui": GUIDANCE_EXPORT, "lora_gen": f"lora_{part}"}
        networks: tuple[Network, ...] = ("gen", "gui")
        self._losses = {network: StepLines(self.loss_log(network)) for network in networks}
        self._folders = {"accelerator_1": "", "accelerator_2": "", "torch_units": "", **exports}

    def open(self, step: int) -> None:
        """Where the run begins or goes on after `step` steps: lines of later steps move to `*.discarded.jsonl`."""
        for folder in (self.loss_log("gen").parent, *(self._checkpoints / name for name in self._folders)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"{folder} is to be a folder of the run: {error.strerror}") from error
        with beside_training("writing args.json"):
            arguments = redact_values(self._config.model_dump(mode="json"))
            (self._run / "args.json").write_text(json.dumps(arguments, indent=2, ensure_ascii=False) + "\n", "utf-8")
        with beside_training("linking log.txt"):
            _link(self._run / "log.txt", self._run / "train.log")
        for lines in self._losses.values():
            keep_until(lines.path, step)
        with beside_training("linking to checkpoints"):
            self._remove_dead_links()

    def loss_log(self, network: Network) -> Path:
        """The file with a JSON object per update: `step`, counted in training steps, and its figures."""
        return self._run / "loss_logs" / f"loss_{network}_log.jsonl"

    def write_losses(self, network: Network, step: int, figures: Mapping[str, float]) -> None:
        """Appends the line of an update made in training step `step`, the first being 1: its figures."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        self._losses[network].append({"step": step, **finite})

    def link(self, checkpoint: Path) -> None:
        """Leads to `checkpoint` from the documented places, and no longer to those that were pruned."""
        for lines in self._losses.values():
            lines.write_waiting()
        with beside_training("linking to checkpoints"):
            for folder, inside in self._folders.items():
                suffix = ".pt" if folder == "torch_units" else ""
                if (checkpoint / inside).is_dir():
                    _link(self._checkpoints / folder / f"{checkpoint.name}{suffix}", checkpoint / inside)
            self._remove_dead_links()

    def _remove_dead_links(self) -> None:
        for folder in self._folders:
            for path in (self._checkpoints / folder).glob("step-*"):
                if path.is_symlink() and not path.exists() and os.readlink(path).startswith(_TO_CHECKPOINTS):
                    path.unlink()


def _link(path: Path, target: Path) -> None:
    """A relative link at `path`; what is there already, an earlier link to it or anything else, stays."""
    if not path.exists() and not path.is_symlink():
        path.symlink_to(os.path.relpath(target, path.parent), target_is_directory=target.is_dir())
