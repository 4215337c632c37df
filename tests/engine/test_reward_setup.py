"""From the configuration's reward sections to the options that `rewards` takes."""

from typing import Any

from glm_training.config import Config
from glm_training.engine.reward_setup import differentiable_options


def build(**reward: Any) -> Config:
    metrics = {"weights": {"clip_score": 1.0}, "options": {"hps_v2": {"weights": "hps.pt", "architecture": "tiny"}}}
    return Config.model_validate({"dmdr": {"reward": reward}, "reward": metrics})


def test_every_key_of_the_differentiable_reward_arrives() -> None:
    options = differentiable_options(
        build(
            method="srpo",
            weights={"hps_v2": 5.0},
            threshold=0.6,
            positive_words="Sharp.",
            negative_words="Blurred.",
            srpo_strength=0.2,
            clip_h_weights="clip.bin",
            clip_h_architecture="ViT-B-32",
        )
    )
    assert (options.method, options.weights, options.threshold) == ("srpo", {"hps_v2": 5.0}, 0.6)
    assert (options.positive_words, options.negative_words, options.strength) == ("Sharp.", "Blurred.", 0.2)
    assert (str(options.clip_h.weights), options.clip_h.architecture) == ("clip.bin", "ViT-B-32")
    assert (str(options.hps_v2.weights), options.hps_v2.architecture) == ("hps.pt", "tiny")


def test_words_that_are_not_given_depend_on_the_method() -> None:
    assert differentiable_options(build()).positive_words == ""
    assert differentiable_options(build(method="srpo")).positive_words == "Realistic photo."
    assert differentiable_options(build(method="srpo", positive_words="")).positive_words == ""
