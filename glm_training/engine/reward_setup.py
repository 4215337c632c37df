"""The options of the metrics, from the configuration's section to what `rewards` takes."""

from __future__ import annotations

from glm_training.config import Config
from glm_training.config.sections.reward_options import RemoteRewardConfig
from glm_training.rewards import (
    AestheticOptions,
    ClipHOptions,
    ClipScoreOptions,
    DifferentiableOptions,
    HpsV2Options,
    LpipsOptions,
    ObjectsOptions,
    PickScoreOptions,
    RemoteOptions,
    RewardOptions,
    StructureOptions,
    TextAccuracyOptions,
)

_SRPO_POSITIVE = "Realistic photo."


def reward_options(config: Config) -> RewardOptions:
    """`reward.options` and `reward.on_error`."""
    options = config.reward.options
    objects = options.objects
    return RewardOptions(
        text_accuracy=TextAccuracyOptions(
            options.text_accuracy.engine,
            tuple(options.text_accuracy.languages),
            tuple(options.text_accuracy.model_files.items()),
            options.text_accuracy.extra_text_penalty,
            options.text_accuracy.min_confidence,
        ),
        objects=ObjectsOptions(objects.color, objects.shape, objects.relation, objects.number),
        lpips=LpipsOptions(options.lpips.backbone_weights),
        aesthetic=AestheticOptions(options.aesthetic.clip_name, options.aesthetic.mlp_weights),
        structure=StructureOptions(config.structure_reference()),
        clip_score=ClipScoreOptions(options.clip_score.clip_name),
        pick_score=PickScoreOptions(options.pick_score.model_name, options.pick_score.processor_name),
        hps_v2=HpsV2Options(options.hps_v2.weights, options.hps_v2.architecture),
        remote={name: _remote(remote) for name, remote in options.remote.items()},
        on_error=config.reward.on_error,
    )


def differentiable_options(config: Config) -> DifferentiableOptions:
    """`dmdr.reward`, with HPSv2.1 as `reward.options.hps_v2` has it."""
    reward, hps_v2 = config.dmdr.reward, config.reward.options.hps_v2
    default_words = _SRPO_POSITIVE if reward.method == "srpo" else ""
    return DifferentiableOptions(
        weights=reward.weights,
        method=reward.method,
        threshold=reward.threshold,
        positive_words=default_words if reward.positive_words is None else reward.positive_words,
        negative_words=reward.negative_words,
        strength=reward.srpo_strength,
        clip_h=ClipHOptions(reward.clip_h_weights, reward.clip_h_architecture),
        hps_v2=HpsV2Options(hps_v2.weights, hps_v2.architecture),
    )


def _remote(remote: RemoteRewardConfig) -> RemoteOptions:
    return RemoteOptions(
        remote.url,
        tuple(remote.send),
        remote.batch_size,
        remote.concurrent_requests,
        remote.timeout_seconds,
        remote.retries,
        remote.backoff_seconds,
        remote.token_variable,
    )
