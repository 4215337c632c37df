"""What an adapter says of itself is what it says to PEFT, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from glm_training.engine.named_model import named_adapters, named_model
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import add_lora

GONE = object()
"""A setting that is left out."""


def small_adapter(folder: Path, **settings: object) -> Path:
    """PEFT's folder of an adapter of the DiT half of `tiny-random`."""
    family = GLMImage.load("tiny-random")
    add_lora(family.module("dit"), ["to_q"], 2, 4.0)
    family.save_lora("dit", folder / "lora_dit")
    config = folder / "lora_dit" / "adapter_config.json"
    told = json.loads(config.read_text()) | settings
    config.write_text(json.dumps({key: value for key, value in told.items() if value is not GONE}))
    return folder


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "begun by pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "begun by olora"),
        ({"alpha_pattern": {"to_(": 3}}, "cannot be read"),
        ({"alpha_pattern": ["to_q"]}, "cannot be read"),
    ],
)
def test_settings_that_are_not_merged_as_peft_does_are_refused(tmp_path: Path, settings, why: str) -> None:
    """Of PiSSA and OLoRA PEFT takes the first B A off the weights before it adds what was learned."""
    with pytest.raises(ModelLoadError, match=why):
        named_adapters([str(small_adapter(tmp_path, **settings))], named_model("tiny-random"), "glm_image")


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": GONE},
        {"lora_alpha": GONE, "use_rslora": True},
        {"lora_alpha": GONE, "alpha_pattern": {"0.attn1.to_q": 3}},
        {"lora_alpha": 3, "r": 8, "rank_pattern": {"to_q": 2}},
        {"lora_alpha": 0.5, "alpha_pattern": None, "rank_pattern": None},
    ],
)
def test_settings_mean_what_they_mean_to_peft(tmp_path: Path, settings) -> None:
    """The strength of each layer, as PEFT comes to it by the same file; what is left out too."""
    folder = small_adapter(tmp_path, **settings) / "lora_dit"
    ((found,), _) = named_adapters([str(folder)], named_model("tiny-random"), "glm_image")
    module = GLMImage.load("tiny-random").module("dit")
    told = LoraConfig.from_pretrained(str(folder))
    told.alpha_pattern, told.rank_pattern = told.alpha_pattern or {}, told.rank_pattern or {}
    inject_adapter_in_model(told, module)
    scales = {name: layer.scaling["default"] for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    assert {layer: found.scale(layer) for layer in found.layers()} == scales


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"r": 4}, "r is 4, and the weights of .*to_q have rank 2"),
        ({"r": GONE}, "r is 8, and the weights of .*to_q have rank 2"),
        ({"rank_pattern": {"to_q": 3}}, "rank_pattern is 3, and the weights of .*to_q have rank 2"),
        ({"r": "2"}, 'r is "2", and no whole number'),
        ({"r": 2.0}, "r is 2.0, and no whole number"),
        ({"rank_pattern": {"to_q": "2"}}, 'rank_pattern: to_q is "2", and no whole number'),
        ({"lora_alpha": "4"}, 'lora_alpha is "4", and no number'),
        ({"lora_alpha": None}, "lora_alpha is not there, and no number"),
        ({"lora_alpha": True}, "lora_alpha is true, and no number"),
        ({"alpha_pattern": {"to_q": "4"}}, 'alpha_pattern: to_q is "4", and no number'),
        ({"peft_type": "LOHA"}, 'peft_type is "LOHA", and adapters of LORA alone'),
        ({"peft_type": GONE}, "peft_type is not there, and adapters of LORA alone"),
    ],
)
def test_settings_that_peft_refuses_are_refused_with_file_and_key(tmp_path: Path, settings, why: str) -> None:
    folder = small_adapter(tmp_path, **settings)
    with pytest.raises(ModelLoadError, match=f"--lora: {folder}/lora_dit/adapter_config.json: {why}"):
        named_adapters([str(folder)], named_model("tiny-random"), "glm_image")


@pytest.mark.parametrize("what", ["weight", "alpha", "rank"])
def test_adapters_that_are_not_numbers_change_no_weight(tmp_path: Path, what: str) -> None:
    folder = small_adapter(tmp_path, **({"lora_alpha": float("nan")} if what == "alpha" else {}))
    file = folder / "lora_dit" / "adapter_model.safetensors"
    weights = load_file(file)
    (a, *_), (b, *_) = ([name for name in sorted(weights) if f"lora_{side}" in name] for side in "AB")
    if what == "weight":
        weights[b][0, 0] = torch.inf
    elif what == "rank":
        weights |= {a: weights[a][:0].clone(), b: weights[b][:, :0].clone()}
    save_file(weights, file)
    with pytest.raises(ModelLoadError, match="is not whole" if what == "rank" else "is not finite, first"):
        model = named_model("tiny-random")
        found, _ = named_adapters([str(folder)], model, "glm_image")
        model.load("glm_image", dtype=torch.float32, device="cpu", adapters=found)


def test_a_file_that_is_not_the_one_that_is_read_is_refused(tmp_path: Path) -> None:
    folder = small_adapter(tmp_path) / "lora_dit"
    (folder / "style.safetensors").write_bytes(b"another adapter")
    model = named_model("tiny-random")
    with pytest.raises(ModelLoadError, match="adapter_model.safetensors would be read, not style.safetensors"):
        named_adapters([f"dit={folder}/style.safetensors:0.5"], model, "glm_image")
    (found,), _ = named_adapters([f"dit={folder}/adapter_model.safetensors:0.5"], model, "glm_image")
    assert found.folder == folder and found.strength == 0.5
