"""What can stop a training run, in the user's words."""

from __future__ import annotations

from glm_training.data import DataError
from glm_training.models.loading import ModelLoadError
from glm_training.rewards import RewardBackendError, RewardConfigError
from glm_training.utils.distributed import DistributedError
from glm_training.utils.trackers import TrackerError


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to change.

    shared: every process raises it, with the same message. trace: the traceback of its cause, for `train.log`.
    """

    shared = False
    trace = ""


class SettingsError(TrainingError):
    """The configuration asks for what cannot be done here; found before anything is trained, by
    every process."""

    shared = True


class GateError(TrainingError):
    """Replayed log-probs differ from the rollout's before the first update: nothing learned from them would be true."""


class DeviceMemoryError(TrainingError):
    """The device is out of memory; the message names the phase, the peak and the keys to change, in order."""


class ScoringError(TrainingError):
    """The rewards failed in the middle of a run; the message says where it stopped. Raised on every process."""


class DataLostError(TrainingError):
    """What was scanned before the run can no longer be read."""


class UnforeseenError(TrainingError):
    """An error that nobody gave a name: a fault of ours, of a library or of the user's code."""


class NonFiniteError(TrainingError):
    """Values are not finite: in the weights, in a gradient, or before there is one; no optimizer step was taken with
    them."""

    def __init__(self, what: str, step: int | None = None) -> None:
        """`what` is not finite, and where; `step` counts the finished steps. Without it `what` is all there is to
        say."""
        if step is not None:
            what = (
                f"{what}, in step {step + 1}; nothing was learned from it. Lower the learning rate, or set "
                "training.mixed_precision to bf16 or no"
            )
        super().__init__(what)


USER_ERRORS = (
    SettingsError,
    DataError,
    RewardConfigError,
    RewardBackendError,
    ModelLoadError,
    TrackerError,
    DistributedError,
)
"""What configuration, data or the launch are at fault for, found before the first step: exit code 2."""
