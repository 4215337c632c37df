"""What preference tuning asks of the other sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_training.config import Config
from tests.config.building import build, first_paths


def sections(**changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {
        "model": {"family": "sdxl", "name": "tiny-random"},
        "training": {"method": "dpo"},
        "data": {"pairs": "data/preference"},
        "reward": {},
    }
    return {name: tree.get(name, {}) | changed.get(name, {}) for name in {*tree, *changed}}


GLM = {"family": "glm_image", "component": "both"}
LORA = {"enabled": True, "dropout": 0.1}


def test_pairs_are_all_it_needs() -> None:
    config = Config.model_validate(sections())
    assert config.parts() == ("unet",) and not config.reward.enabled and config.data.prompts_file is None
    assert Config.model_validate(sections(model=GLM)).parts() == ("ar", "dit")
    Config.model_validate(sections(dpo={"crop": "random"}))
    Config.model_validate(sections(model=GLM, dpo={"crop": "random", "cache": False, "loss": "sft"}))
    Config.model_validate(sections(lora={"enabled": False, "dropout": 0.1}))


def test_the_cache_has_two_names_for_each_of_its_keys() -> None:
    for older, newer in (({"cache": False}, {"enabled": False}), ({"cache_dir": "a"}, {"dir": "a"})):
        for changed in ({"dpo": older}, {"cache": newer}, {"dpo": older, "cache": newer}):
            config = build(**sections(**changed))
            assert config.caches() == (False not in older.values())
            assert config.encoded_cache_dir() == Path("a" if "cache_dir" in older else "runs/default/cache")
    other = {"model": {"family": "vgt", "name": "tiny"}, "training": {}, "data": {"images": "x"}}
    assert Config.model_validate(sections()).caches() and not Config.model_validate(other).caches()


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("data.pairs", {"data": {"pairs": None}}),
        ("data.pairs", {"training": {"method": "finetune"}, "model": GLM}),
        ("evaluation.eval_pairs", {"training": {"method": "dmdr"}, "evaluation": {"eval_pairs": "x"}}),
        ("data.prompts_file", {"data": {"prompts_file": "prompts.txt"}}),
        ("data.target_images_dir", {"data": {"target_images_dir": "images"}}),
        ("data.augmentation", {"data": {"augmentation": True}}),
        ("training.mode", {"training": {"mode": "i2i"}, "model": GLM}),
        ("lora.dropout", {"lora": LORA}),
        ("lora.dropout", {"lora": LORA, "dpo": {"loss": "sft"}, "model": GLM}),
        ("dpo.crop", {"dpo": {"crop": "random", "cache": False}, "model": GLM}),
        ("dpo.min_snr_gamma", {"dpo": {"min_snr_gamma": 5.0}, "model": GLM}),
        ("dpo.timesteps", {"dpo": {"timesteps": "turbo"}, "model": GLM}),
        ("dpo.prompt_dropout", {"dpo": {"prompt_dropout": 0.1}, "model": GLM | {"component": "ar"}}),
        ("dpo.cache_dir", {"dpo": {"cache": False, "cache_dir": "x"}}),
        ("cache.dir", {"cache": {"enabled": False, "dir": "x"}}),
        ("cache.dir", {"dpo": {"cache": False}, "cache": {"dir": "x"}}),
        ("dpo.cache", {"dpo": {"cache": True}, "cache": {"enabled": False}}),
        ("dpo.cache_dir", {"dpo": {"cache_dir": "x"}, "cache": {"dir": "y"}}),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, changed: dict[str, Any]) -> None:
    assert path in first_paths(**sections(**changed))
