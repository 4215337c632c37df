"""Post-training for GLM-Image: reward training and supervised finetuning from one YAML file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_training.rewards import RewardBatch, RewardCalculator, RewardResult

__version__ = "0.1.0"
__all__ = ["RewardBatch", "RewardCalculator", "RewardResult", "__version__"]


def __getattr__(name: str) -> Any:
    """What a reward of one's own is written with, from `glm_training.rewards`; loaded when it is asked for, as that
    needs torch."""
    if name in __all__:
        import glm_training.rewards

        return getattr(glm_training.rewards, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
