"""What keys that change only how a run computes, not what, ask of the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def speed_issues(config: Config) -> Iterator[Issue]:
    """`training.compile`, `rollout.cuda_graph` and `distributed.gather` where they could not work or do nothing."""
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
    yield from _gather(config)


def _gather(config: Config) -> Iterator[Issue]:
    if config.distributed.gather == "auto":
        return
    if config.model.family != "glm_image":
        yield Issue(
            ("distributed.gather", "model.family"), "shards of other models are gathered whole to draw.", "Remove it."
        )
    elif config.training.method == "dmdr":
        yield Issue(
            ("distributed.gather", "training.method"), "shards of a student are gathered whole to draw.", "Remove it."
        )
    elif config.distributed.gather == "block" and config.rollout.cuda_graph is True:
        yield Issue(
            ("distributed.gather", "rollout.cuda_graph"),
            "a CUDA graph holds no weights that are gathered anew at each token.",
            "Use `rollout.cuda_graph: auto`, or `distributed.gather: half`.",
        )
