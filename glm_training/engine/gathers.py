"""How a half of GLM-Image that lies in shards is gathered while it draws: whole, once, or block by block."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import Parameter

from glm_training.config import Config
from glm_training.models.family import Family

TRAINED = 16
"""Bytes of a trained parameter: its weight in fp32, gradient and moments."""
_SHARE_TO_DRAW = 0.75
"""Of the memory of a device, what lies there may take with a half that is whole: the rest is caches and activations."""


@dataclass(frozen=True)
class Gather:
    """How a half is gathered while it draws, its bytes when it is whole, and why."""

    part: str
    by_block: bool
    size: float
    reason: str

    def told(self) -> str:
        """A line for the user."""
        how = "block by block" if self.by_block else f"whole, {self.size / 1e9:.1f} GB"
        return f"while {self.part} draws its shards are gathered {how}: {self.reason}"


def fits_whole(lying: float, half: float, device: float) -> bool:
    """Whether `distributed.gather: auto` gathers a half of so many bytes whole, beside `lying` bytes of weights,
    gradients and moments on a device of so many bytes."""
    return lying + half <= _SHARE_TO_DRAW * device


def needs_whole(config: Config, part: str) -> bool:
    """Whether a half must be whole while it draws: a CUDA graph holds no weights that come and go."""
    return part == "ar" and config.rollout.cuda_graph is True


def may_choose(config: Config) -> bool:
    """Whether there is a choice: other families and DMDR's student, whose networks are called in pieces, have none."""
    return config.model.family == "glm_image" and config.training.method != "dmdr"


def gathers(config: Config, family: Family, shards: int, device: float) -> list[Gather]:
    """Of each half that will lie in so many shards on devices of so many bytes, where there is a choice."""
    if not may_choose(config):
        return []
    share = 0.0 if config.distributed.offload else 1 / shards
    asked, lying = config.distributed.gather, lying_bytes(config, family, share)
    found = []
    for part in config.parts():
        size = whole_bytes(config, family, part)
        if asked != "auto":
            found.append(Gather(part, asked == "block", size, "as distributed.gather says"))
            continue
        told = f"beside {lying / 1e9:.1f} GB of weights, gradients and moments, on a device of {device / 1e9:.0f}"
        fits = fits_whole(lying, size, device)
        whole = fits or needs_whole(config, part)
        found.append(Gather(part, not whole, size, told if fits or not whole else "as rollout.cuda_graph needs"))
    return found


def lying_bytes(config: Config, family: Family, share: float) -> float:
    """What a process holds all the time of the model, and of the gradients and moments of what is trained; of the
    halves that are trained its `share` alone."""
    spread = {id(p) for part in config.parts() for p in _spread(family, part)}
    trained = {id(p) for part in config.parts() for p in family.trainable(part).values()}
    parameters = {id(p): p for name in family.components for p in family.component(name).parameters()}
    return sum(
        p.numel() * (TRAINED if key in trained else p.element_size()) * (share if key in spread else 1.0)
        for key, p in parameters.items()
    )


def whole_bytes(config: Config, family: Family, part: str) -> float:
    """A half that lies in shards, in the dtype in which it is gathered."""
    low, trained = config.training.mixed_precision == "bf16", {id(p) for p in family.trainable(part).values()}
    return float(
        sum(p.numel() * (2 if low else 4 if id(p) in trained else p.element_size()) for p in _spread(family, part))
    )


def _spread(family: Family, part: str) -> list[Parameter]:
    """The parameters of a half that lie in shards once they do."""
    kept = {id(p) for module in family.frozen() for p in module.parameters()}
    return [p for p in family.component(part).parameters() if id(p) not in kept]
