"""What keys that change only how fast a run computes ask of the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def speed_issues(config: Config) -> Iterator[Issue]:
    """`training.compile` and `rollout.cuda_graph` where they could not work or would do nothing."""
    if config.training.compile and config.model.family == "vgt":
        yield Issue(
            ("training.compile", "model.family"),
            "VGT's blocks read a cache that is longer at each step, and each length would be compiled anew.",
            "Remove it.",
        )
    if config.training.compile and config.model.quantization != "none":
        yield Issue(
            ("training.compile", "model.quantization"),
            "products with weights in few bits are bitsandbytes' own kernels, between which little is left to compile.",
            "Remove one of the two.",
        )
    graph = config.rollout.cuda_graph
    if graph != "auto" and config.model.family != "glm_image":
        yield Issue(("rollout.cuda_graph", "model.family"), "only GLM-Image has an AR half.", "Remove it.")
    elif graph is True and config.model.device_map == "cpu":
        yield Issue(("rollout.cuda_graph", "model.device_map"), "the CPU has no CUDA graphs.", "Use `auto`.")
