"""The update rule of a part: AdamW, AdamW in 8 bits, or SGD, all with decoupled weight decay (arXiv:1711.05101)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.errors import SettingsError

DECOUPLED = "decoupled_weight_decay"
"""Key of an SGD group's decay. Torch's own `weight_decay` is L2 there: it adds to gradient and momentum."""


RATE_SCALE = "rate_scale"
"""Key of a group: its learning rate as a share of the part's."""


def build_optimizer(
    settings: ResolvedOptimizer, parameters: Mapping[str, nn.Parameter], rate_scales: Mapping[str, float]
) -> Optimizer:
    """The optimizer of `parameters`, in one group that decays and one that does not, for each of the `rate_scales` by
    parameter name (1 for those without).

    Raises SettingsError for `adamw_8bit` without bitsandbytes or a GPU.
    """
    kinds = {
        name: (settings.weight_decay if decays(name, p, settings) else 0.0, rate_scales.get(name, 1.0))
        for name, p in parameters.items()
    }
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name, own in kinds.items() if own == (decay, scale)],
            "weight_decay": decay,
            RATE_SCALE: scale,
        }
        for decay, scale in dict.fromkeys(kinds.values())
    ]
    if settings.name == "sgd":
        return _sgd(settings, groups)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    check_optimizer(settings.name, next(iter(parameters.values())).device)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)


def decays(name: str, parameter: nn.Parameter, settings: ResolvedOptimizer) -> bool:
    """Whether weight decay acts on a parameter: on matrices and kernels, LoRA's among them, and on embeddings.

    Scales of norms and biases are vectors; pulled to zero they would switch channels off rather than simplify anything.
    """
    return settings.decay_norms_and_biases or (parameter.ndim >= 2 and name.rpartition(".")[2] != "bias")


def _sgd(settings: ResolvedOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """p <- p (1 - lr decay) - lr m with m <- momentum m + gradient."""
    for group in groups:
        group[DECOUPLED] = group.pop("weight_decay")
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1)
    optimizer.register_step_pre_hook(_decay)  # a step that loss scaling leaves out decays nothing
    return optimizer


@torch.no_grad()
def _decay(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        if moving and group[DECOUPLED]:
            torch._foreach_mul_(moving, 1 - group["lr"] * group[DECOUPLED])


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises SettingsError for an update rule that cannot run here."""
    if name != "adamw_8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError('optimizer adamw_8bit needs bitsandbytes: pip install "glm_training[bitsandbytes]"')
    if device.type != "cuda":
        raise SettingsError("optimizer adamw_8bit needs a GPU, and this run computes on the CPU: use adamw or sgd")
