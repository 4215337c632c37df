"""What can stop a training run, in the user's words."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to change."""


class SettingsError(TrainingError):
    """The configuration asks for what cannot be done here; found before anything is trained."""


class GateError(TrainingError):
    """Replayed log-probs differ from the rollout's before the first update: nothing learned from them would be true."""


class NonFiniteError(TrainingError):
    """A gradient is not finite; the optimizer step was not taken."""

    def __init__(self, part: str, step: int, norm: float) -> None:
        super().__init__(
            f"the gradient norm of the {part} half is {norm} at step {step}; this update was not taken. Lower its "
            "learning rate, or set mixed_precision to bf16 or no; the last checkpoint is untouched"
        )
        self.part = part
        self.step = step
