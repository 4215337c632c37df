"""What can stop a training run, in the user's words."""

from __future__ import annotations

from glm_training.data import DataError
from glm_training.models.loading import ModelLoadError
from glm_training.rewards import RewardBackendError, RewardConfigError
from glm_training.utils.distributed import DistributedError
from glm_training.utils.trackers import TrackerError


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to change."""


class SettingsError(TrainingError):
    """The configuration asks for what cannot be done here; found before anything is trained."""


class GateError(TrainingError):
    """Replayed log-probs differ from the rollout's before the first update: nothing learned from them would be true."""


class DeviceMemoryError(TrainingError):
    """The device is out of memory; the message names the phase, the peak and the keys to change, in order."""


class ScoringError(TrainingError):
    """The rewards failed in the middle of a run; the message says where it stopped. Raised on every process."""


class NonFiniteError(TrainingError):
    """Values are not finite, in a gradient or before there is one; no optimizer step was taken with them."""

    def __init__(self, what: str, step: int) -> None:
        """`what` is not finite, and where; `step` counts the finished steps."""
        super().__init__(
            f"{what}, in step {step + 1}; nothing was learned from it. Lower the learning rate, or set "
            "training.mixed_precision to bf16 or no; the last checkpoint is untouched"
        )
        self.step = step


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
