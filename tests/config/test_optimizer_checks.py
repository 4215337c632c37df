"""What update rules, schedules and averages ask of the rest of a configuration, and their own defaults."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from glm_training.config.checks.cross_field import cross_field_issues
from glm_training.config.sections.optimization import OptimizerName
from tests.config.building import build, issues

FREE = {"optimizer": "adamw_schedule_free"}
GENERATOR = {"model": {"family": "vgt"}, "data": {"images": "t"}}
AUTOENCODER = {"model": {"family": "vgt", "component": "autoencoder"}, "data": {"images": "t"}}


@pytest.mark.parametrize(
    ("rule", "rates", "beta2", "scheduler"),
    [
        ("adamw", (5e-6, 1e-5), 0.999, "cosine"),
        ("prodigy", (1.0, 1.0), 0.999, "cosine"),
        ("lion", (5e-6, 1e-5), 0.99, "cosine"),
        ("muon", (5e-6, 1e-5), 0.999, "cosine"),
        ("adamw_schedule_free", (5e-6, 1e-5), 0.999, "constant"),
    ],
)
def test_a_rule_has_its_own_defaults(rule: str, rates: tuple[float, float], beta2: float, scheduler: str) -> None:
    config = build(training={"optimizer": rule})
    found = [config.optimizer_for("ar"), config.optimizer_for("dit")]
    assert tuple(settings.learning_rate for settings in found) == rates
    assert {(settings.beta2, settings.scheduler) for settings in found} == {(beta2, scheduler)}


def test_what_is_written_goes_before_a_rules_defaults() -> None:
    half = build(training={"ar_learning_rate": 0.5}, optimizer={"ar": {"name": "prodigy"}})
    assert half.optimizer_for("ar").learning_rate == 0.5
    config = build(training={"optimizer": "prodigy", "learning_rate": 0.5, "dit_learning_rate": 2.0})
    assert (config.optimizer_for("ar").learning_rate, config.optimizer_for("dit").learning_rate) == (0.5, 2.0)
    assert build(training={"optimizer": "lion", "adam_beta2": 0.9}).optimizer_for("ar").beta2 == 0.9


def test_the_rule_of_one_half_leaves_the_other_alone() -> None:
    config = build(optimizer={"ar": {"name": "prodigy"}, "dit": {"name": "adamw_schedule_free"}})
    ar, dit = config.optimizer_for("ar"), config.optimizer_for("dit")
    assert (ar.name, ar.learning_rate, ar.scheduler) == ("prodigy", 1.0, "cosine")
    assert (dit.name, dit.learning_rate, dit.scheduler) == ("adamw_schedule_free", 1e-5, "constant")


@pytest.mark.parametrize(
    ("sections", "paths"),
    [
        ({"training": FREE | {"lr_scheduler": "cosine"}}, ("training.lr_scheduler", "training.optimizer")),
        (
            {"training": FREE, "optimizer": {"dit": {"scheduler": "linear"}}},
            ("optimizer.dit.scheduler", "training.optimizer"),
        ),
        ({"training": FREE | {"adam_beta1": 0.0}}, ("training.adam_beta1", "training.optimizer")),
        ({"training": FREE | {"ema": {"decay": 0.9}}}, ("training.ema.decay", "training.optimizer")),
        (
            {"training": {"optimizer": "prodigy", "learning_rate": 1e-5}},
            ("training.learning_rate", "training.optimizer"),
        ),
        (
            {"training": {"optimizer": "prodigy", "dit_learning_rate": 1e-5}},
            ("training.dit_learning_rate", "training.optimizer"),
        ),
        (
            {"optimizer": {"ar": {"name": "prodigy", "learning_rate": 1e-5}}},
            ("optimizer.ar.learning_rate", "optimizer.ar.name"),
        ),
        ({"training": {"lr_cycles": 3}}, ("training.lr_cycles", "training.lr_scheduler")),
        ({"training": {"lr_power": 2.0}}, ("training.lr_power", "training.lr_scheduler")),
        ({"optimizer": {"ar": {"power": 2.0}}}, ("optimizer.ar.power", "training.lr_scheduler")),
        (
            {"training": {"lr_scheduler": "constant"}, "optimizer": {"ar": {"min_lr_ratio": 0.1}}},
            ("optimizer.ar.min_lr_ratio", "training.lr_scheduler"),
        ),
        (
            {"training": {"weight_decay": 0.0}, "optimizer": {"decay_norms_and_biases": True}},
            ("optimizer.decay_norms_and_biases", "training.weight_decay"),
        ),
        ({"training": {"ema": {"export": False}}}, ("training.ema.export", "training.ema.decay")),
        ({**AUTOENCODER, "training": {"optimizer": "prodigy"}}, ("vgt.encoder_rate_ratio", "training.optimizer")),
        (
            {**AUTOENCODER, "training": {"optimizer": "prodigy"}, "vgt": {"encoder_rate_ratio": 0.0}},
            ("vgt.encoder_rate_ratio", "training.optimizer"),
        ),
        (
            {
                "model": {"component": "dit"},
                "training": {"method": "dmdr", "optimizer": "prodigy"},
                "dmdr": {"guidance_learning_rate": 1e-6},
            },
            ("dmdr.guidance_learning_rate", "training.optimizer"),
        ),
    ],
)
def test_what_does_not_go_together_is_told_once(sections: dict[str, Any], paths: tuple[str, ...]) -> None:
    assert [issue.paths for issue in issues(**sections)] == [paths]


USED = {
    "adamw": {"beta1", "beta2", "epsilon"},
    "adamw_8bit": {"beta1", "beta2", "epsilon"},
    "adafactor": set(),
    "prodigy": {"beta1", "beta2", "epsilon"},
    "lion": {"beta1", "beta2"},
    "muon": {"beta1", "beta2", "epsilon"},
    "adamw_schedule_free": {"beta1", "beta2", "epsilon"},
    "sgd": {"beta1"},
}


@pytest.mark.parametrize("key", ["beta1", "beta2", "epsilon"])
@pytest.mark.parametrize("rule", get_args(OptimizerName))
def test_a_key_that_a_rule_has_no_use_for_is_told(rule: str, key: str) -> None:
    shared = build(training={"optimizer": rule, f"adam_{key}": 0.75})
    own = build(optimizer={"dit": {"name": rule, key: 0.75}})
    unused = key not in USED[rule]
    told = [(issue.paths, issue.message) for config in (shared, own) for issue in cross_field_issues(config)]
    why = f"`{rule}` has no use for it."
    assert told == unused * [
        ((f"training.adam_{key}", "training.optimizer"), why),
        ((f"optimizer.dit.{key}", "optimizer.dit.name"), why),
    ]


def test_a_key_that_one_half_has_a_use_for_is_taken() -> None:
    halves = {"training": {"optimizer": "sgd", "adam_beta2": 0.75}, "optimizer": {"ar": {"name": "adamw"}}}
    assert cross_field_issues(build(**halves)) == []
    ar_has_its_own = {**halves, "optimizer": {"ar": {"name": "adamw", "beta2": 0.5}}}
    assert [issue.paths for issue in issues(**ar_has_its_own)] == [("training.adam_beta2", "training.optimizer")]


@pytest.mark.parametrize("rule", get_args(OptimizerName))
def test_moments_in_bf16_are_adamws(rule: str) -> None:
    narrow = {"moments_dtype": "bfloat16"}
    shared = cross_field_issues(build(training={"optimizer": rule}, optimizer=narrow))
    own = cross_field_issues(build(optimizer={"dit": {"name": rule} | narrow}))
    refused = rule != "adamw"
    assert [issue.paths for issue in shared] == refused * [("optimizer.moments_dtype", "training.optimizer")]
    assert [issue.paths for issue in own] == refused * [("optimizer.dit.moments_dtype", "optimizer.dit.name")]
    one_half = {"training": {"optimizer": rule}, "optimizer": narrow | {"ar": {"name": "adamw"}}}
    assert cross_field_issues(build(**one_half)) == []
    config = build(optimizer=narrow | {"dit": {"moments_dtype": "float32"}})
    assert [config.optimizer_for(part).moments_dtype for part in ("ar", "dit")] == ["bfloat16", "float32"]


@pytest.mark.parametrize("rule", get_args(OptimizerName))
def test_written_defaults_are_not_told(rule: str) -> None:
    """As the file of a resolved configuration has all of them."""
    defaults = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    assert cross_field_issues(build(training={"optimizer": rule} | defaults)) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"training": FREE | {"warmup_steps": 10}},
        {"training": {"optimizer": "prodigy", "learning_rate": 0.1}},
        {"training": {"lr_scheduler": "cosine_with_restarts", "lr_cycles": 3}},
        {"training": {"lr_scheduler": "linear"}, "optimizer": {"dit": {"scheduler": "polynomial", "power": 2.0}}},
        {"training": {"ema": {"decay": 0.9, "evaluate": False}}},
        {**AUTOENCODER, "training": {"optimizer": "prodigy"}, "vgt": {"encoder_rate_ratio": 1.0}},
        {**GENERATOR, "training": {"optimizer": "prodigy"}},
    ],
)
def test_what_goes_together_is_taken(sections: dict[str, Any]) -> None:
    assert cross_field_issues(build(**sections)) == []
