"""From the configuration's reward sections to the options that `rewards` takes."""

from typing import Any

from glm_training.config import Config
from glm_training.engine.reward_setup import differentiable_options, reward_options
from glm_training.rewards import RemoteOptions, TextAccuracyOptions


def build(**reward: Any) -> Config:
    metrics = {"weights": {"clip_score": 1.0}, "options": {"hps_v2": {"weights": "hps.pt", "architecture": "tiny"}}}
    return Config.model_validate({"dmdr": {"reward": reward}, "reward": metrics})


def test_every_key_of_the_metrics_options_arrives() -> None:
    text = {"engine": "pytesseract", "languages": ["rus"], "extra_text_penalty": 0.3, "min_confidence": 0.6}
    remote = {
        "url": "http://judge:8000",
        "send": ["target"],
        "batch_size": 3,
        "concurrent_requests": 4,
        "timeout_seconds": 5.0,
        "retries": 6,
        "backoff_seconds": 7.0,
        "token_variable": "JUDGE",
    }
    others = {
        "lpips": {"backbone_weights": "alex.pt"},
        "aesthetic": {"clip_name": "clip-a", "mlp_weights": "mlp.pt"},
        "clip_score": {"clip_name": "clip-b"},
        "pick_score": {"model_name": "pick", "processor_name": "words"},
        "hps_v2": {"weights": "hps.pt", "architecture": "tiny"},
        "structure": {"reference": "source"},
    }
    metrics = {"text_accuracy": 1.0, "remote/judge": 1.0}
    reward = {"options": {"text_accuracy": text, "remote": {"judge": remote}, **others}, "on_error": "skip"}
    options = reward_options(Config.model_validate({"reward": {"metrics": metrics, **reward}}))
    assert options.text_accuracy == TextAccuracyOptions("pytesseract", ("rus",), (), 0.3, 0.6)
    assert options.remote == {"judge": RemoteOptions("http://judge:8000", ("target",), 3, 4, 5.0, 6, 7.0, "JUDGE")}
    assert options.on_error == "skip" and options.structure.reference == "source"
    assert str(options.lpips.backbone_weights) == "alex.pt"
    assert (options.aesthetic.clip_name, str(options.aesthetic.mlp_weights)) == ("clip-a", "mlp.pt")
    assert options.clip_score.clip_name == "clip-b"
    assert (options.pick_score.model_name, options.pick_score.processor_name) == ("pick", "words")
    assert (str(options.hps_v2.weights), options.hps_v2.architecture) == ("hps.pt", "tiny")


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
