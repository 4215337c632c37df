"""What VGT's two models ask of the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config

AUTOENCODER_ALONE = (
    "decoder", "channel_norm", "kl", "latent_noise", "encoder_rate_ratio", "distillation_weight",
    "perceptual_weight", "lpips_weights", "convnext_weights", "kl_weight", "gan",
)  # fmt: skip
GENERATOR_ALONE = ("autoencoder", "caption_dropout", "order", "timestep_shift", "repa")
"""Keys of `vgt` that the training of the other model does not read."""


def vgt_issues(config: Config) -> Iterator[Issue]:
    """Everything about `model.family: vgt` that does not go together, and `vgt` where another family is trained."""
    if config.model.family != "vgt":
        yield from _of_another_family(config)
        return
    training, component = config.training, config.model.component
    if training.method != "finetune" or training.use_reward:
        key, value = ("method", training.method) if training.method != "finetune" else ("use_reward", "true")
        yield Issue(
            (f"training.{key}", "model.family"), f"`{value}` does not train VGT.", "Remove it: VGT learns from images."
        )
    if training.mode != "t2i":
        yield Issue(("training.mode", "model.family"), "VGT edits no images.", "Use `t2i`.")
    if config.lora.enabled:
        yield Issue(("lora.enabled", "model.family"), "VGT's models are trained whole.", "Set it to false.")
    if config.model.adapters:
        yield Issue(("model.adapters", "model.family"), "VGT's models take no adapters.", "Remove it.")
    if config.data.images is None:
        yield Issue(
            ("data.images", "model.family"), "VGT learns from captioned images.", "Set it to their folder or tars."
        )
    if component == "autoencoder":
        yield from [*_without_effect(config, GENERATOR_ALONE), *_autoencoder(config)]
    elif component == "generator":  # any other is refused for what it is
        yield from [*_without_effect(config, AUTOENCODER_ALONE), *_generator(config)]


def _of_another_family(config: Config) -> Iterator[Issue]:
    if config.vgt != type(config.vgt)():
        yield Issue(
            ("vgt", "model.family"), f"`{config.model.family}` reads nothing of it.", "Set `model.family: vgt`."
        )


def _without_effect(config: Config, names: tuple[str, ...]) -> Iterator[Issue]:
    plain, component = type(config.vgt)(), config.model.component
    for name in names:
        if getattr(config.vgt, name) != getattr(plain, name):
            yield Issue(
                (f"vgt.{name}", "model.component"), f"the {component}'s training does not read it.", "Remove it."
            )


def _autoencoder(config: Config) -> Iterator[Issue]:
    vgt = config.vgt
    if vgt.lpips_weights is None and vgt.convnext_weights is None and vgt.perceptual_weight != 1.1:
        yield Issue(
            ("vgt.perceptual_weight", "vgt.lpips_weights"),
            "there is no perceptual term.",
            "Give `vgt.lpips_weights` or `vgt.convnext_weights`.",
        )
    if vgt.gan.start_step is None and vgt.gan != type(vgt.gan)():
        yield Issue(("vgt.gan", "vgt.gan.start_step"), "the discriminator never starts.", "Set its `start_step`.")
    if config.training.mixed_precision == "fp16":
        yield Issue(
            ("training.mixed_precision", "model.component"),
            "fp16 scales the losses of two players differently from step to step.",
            "Use bf16 or no.",
        )


def _generator(config: Config) -> Iterator[Issue]:
    repa = config.vgt.repa
    if repa.model is None and repa.weight != type(repa)().weight:
        yield Issue(("vgt.repa.weight", "vgt.repa.model"), "nothing to align with.", "Set `vgt.repa.model`.")
    if config.evaluation.num_inference_steps == 1:
        yield Issue(
            ("evaluation.num_inference_steps", "model.family"),
            "a latent is drawn in noisy steps and a last one without noise, two at least.",
            "Use 30.",
        )
