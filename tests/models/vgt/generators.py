"""Tiny VGT generators whose every weight counts."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from glm_training.models.vgt.generator import Generator
from glm_training.models.vgt.sequence import Prompts
from glm_training.models.vgt.tiny_generator import tiny_random_generator
from glm_training.utils.randomness import normal

Module = TypeVar("Module", bound=nn.Module)


def random_weights(module: Module, scale: float = 0.3) -> Module:
    """`module` without a zero: its layers that start at zero hide what stands before them."""
    with torch.no_grad():
        for name, param in module.named_parameters():
            param += normal(0, name, [()], tuple(param.shape))[0] * scale
    return module


def lively_generator(**changes: Any) -> Generator:
    """A random generator whose head answers."""
    generator = tiny_random_generator(**changes)
    random_weights(generator.head, 0.1)
    return generator


def named_noise(purpose: str, rows: int, *shape: int) -> Tensor:
    return normal(3, purpose, [(row,) for row in range(rows)], shape)


PROMPTS = ["a red circle left of the sign", "GO", "", "two stars"]


def own_prompt(generator: Generator, row: int) -> Prompts:
    """One of `PROMPTS` by itself, so that nothing is padded."""
    return generator.encode_prompts([PROMPTS[row]])
