"""How a run that fails in the middle ends: with an error of a known kind, the same on every process, that says where it
stopped; and, where values are not finite, with a file on what was in hand."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm_training.checkpoint.state_tree import CheckpointError, local_part
from glm_training.config import Config
from glm_training.data import DataError
from glm_training.engine.agreement import losses_explained
from glm_training.engine.errors import DataLostError, NonFiniteError, ScoringError, TrainingError, UnforeseenError
from glm_training.engine.parts import Part
from glm_training.models.gathering import OtherFailed
from glm_training.rewards import RewardError, ScoringStopped
from glm_training.utils.distributed import World
from glm_training.utils.failures import beside_training
from glm_training.utils.signals import StopRequested, StopSignals

logger = logging.getLogger(__name__)

SHOWN = 20
"""Parameters that a dump names, of those whose gradient is not finite."""


@dataclass(frozen=True)
class Drawn:
    """A batch of this process: the items' places in the data, and in the run's sequence of samples, which name the
    random draws."""

    items: Sequence[int]
    positions: Sequence[int]


class InFlight:
    """The work in flight, a training step or an evaluation: whether it can still be dropped, and what an error in it
    means for all processes.

    changed: whether it has changed weights. drawn: the batches of this process so far.
    """

    def __init__(self, config: Config, world: World, parts: Mapping[str, Part], signals: StopSignals) -> None:
        self._config = config
        self._world = world
        self._parts = parts
        self._signals = signals
        self.changed = False
        self.drawn: list[Drawn] = []

    def begin(self) -> None:
        """The next piece of work."""
        self.changed = False
        self.drawn.clear()

    def check(self) -> None:
        """Raises StopRequested when a stop was asked for and the work can be dropped. Every process must call it
        equally often between two optimizer steps."""
        if not self.changed:
            self._signals.check()

    def update(self, part: Part, step: int) -> dict[str, float]:
        """The optimizer step of a part. From here on the training step is finished, whatever is asked."""
        before, self.changed = self.changed, True  # ahead of the step: an error in its middle leaves weights half moved
        try:
            return part.step(step)
        except NonFiniteError:  # raised before any weight of this part changes
            self.changed = before
            raise

    @contextmanager
    def stopping_together(self, step: int, total: int, saved: Path | None) -> Iterator[None]:
        """An error inside becomes a request to stop, on all processes, while the work can be dropped: the last finished
        step is then saved before the run ends. Once weights have changed, it ends the run at once. A scoring that a
        stop signal has ended is no error.

        The other processes learn of it where they poll next, so what may fail on one of them alone must stand between
        two polls, with nothing in between that waits for all. After `step` of `total` steps, with `saved` as the last
        checkpoint.
        """
        try:
            with losses_explained(self._world):
                yield
        except StopRequested:
            raise
        except (ScoringStopped, OtherFailed) as stop:  # what failed elsewhere is told by who failed
            self._signals.poll()
            raise StopRequested from stop
        except Exception as error:  # whatever ends a step: the processes agree on it, or one waits for the others
            failure = as_failure(error)
            if isinstance(failure, NonFiniteError):
                write_dump(self._config, self._world, step, failure, self.drawn, self._parts)
            if any(part.exchanging for part in self._parts.values()):  # the others wait for shards, not for a word
                where = f"Step {step + 1} of {total} was not finished"
                raise ended(failure, where, saved) from error
            if self.changed:
                where = f"Step {step + 1} of {total} was not finished, and had changed weights"
                raise ended(failure, where, saved) from error
            self._signals.fail(failure)
            raise StopRequested from error


def as_failure(error: Exception) -> TrainingError:
    """`error` as the run ends with it: of a kind that has an exit code, and such that processes can send it to each
    other. Of what nobody foresaw it says the place, and keeps the traceback."""
    failure: TrainingError
    if isinstance(error, TrainingError):
        failure = error
    elif isinstance(error, RewardError):
        failure = ScoringError(str(error))
    elif isinstance(error, DataError):
        failure = DataLostError(str(error))
    elif isinstance(error, CheckpointError):
        failure = TrainingError(str(error))
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
        failure = UnforeseenError(f"{type(error).__name__}: {error}{place}. The whole traceback is in train.log")
    failure.trace = failure.trace or "".join(traceback.format_exception(error))
    return failure


def ended(failure: TrainingError, where: str, saved: Path | None, unsaved: str = "") -> TrainingError:
    """`failure` with how the run stopped (`where`) and what a resume has: `saved`, the last checkpoint.

    `unsaved`: why the last finished step could not be saved, where it should have been.
    """
    resume = "no checkpoint was saved" if saved is None else f"--resume continues from {saved}"
    if unsaved:
        where += f", and saving that step failed as well: {unsaved}"
    logger.info("the run stops:\n%s", failure.trace)
    failure.args = (f"{failure}\n{where}: once the cause is mended, {resume}",)
    return failure


def write_dump(
    config: Config, world: World, step: int, error: Exception, drawn: Sequence[Drawn], parts: Mapping[str, Part]
) -> None:
    """What this process had in hand when values were not finite, in `nonfinite/` of the run: items, seed and norms.

    `step` counts the finished steps. Every process writes a file of its own: the fault may lie with one batch of many.
    """
    path = config.output_dir / "nonfinite" / f"step-{step + 1:06d}-process-{world.rank}.json"
    with beside_training("writing what was in hand when values were not finite"), torch.no_grad():
        found = {
            "what": str(error),
            "step": step + 1,
            "process": world.rank,
            "processes": world.world_size,
            "seed": config.seed,
            "batches": [{"items": list(batch.items), "positions": list(batch.positions)} for batch in drawn],
            "parts": {name: _norms_of(part) for name, part in parts.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        error.args = (f"{error}\nThe items, seed and norms of that step are in {path}",)


def _norms_of(part: Part) -> dict[str, Any]:
    """Norms of the weights and of the gradients so far, and the parameters whose gradient is not finite; of shards
    those of this process."""
    gradients = {name: local_part(value.grad) for name, value in part.parameters.items() if value.grad is not None}
    norms = {name: value.norm().item() for name, value in gradients.items()}
    lost = [name for name, norm in norms.items() if not math.isfinite(norm)]
    rest = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
    figures = {
        "weight_norm": nn.utils.get_total_norm([local_part(value) for value in part.parameters.values()]).item(),
        "gradient_norm": nn.utils.get_total_norm(list(gradients.values())).item() if gradients else None,
        "finite_gradient_norm": math.hypot(*rest.values()),
        "largest_finite_gradient": max(rest, key=lambda name: rest[name], default=None),
        "learning_rate": part.optimizer.param_groups[0]["lr"],
        "loss_scale": part.scaler.get_scale() if part.scaler.is_enabled() else None,
    }
    told = {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in figures.items()
    }
    return told | {"gradients_not_finite": len(lost), "first_not_finite": lost[:SHOWN]}
