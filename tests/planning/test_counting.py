"""Parameters, adapters and moments against the networks and optimizers themselves."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from glm_training.config import load_config
from glm_training.config.sections.optimization import AR_TARGETS, DIT_TARGETS, UNET_TARGETS
from glm_training.engine.optimizers import build_optimizer
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import adapter_parameters, add_lora
from glm_training.planning import counting
from glm_training.planning.models import PUBLISHED, read_networks

ROOT = Path(__file__).parents[2]

EXTRAS = {"prodigy": "prodigyopt", "lion": "lion_pytorch", "adamw_schedule_free": "schedulefree"}


def size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def test_published_models_have_the_parameters_that_are_known_of_them():
    glm = read_networks("glm_image", PUBLISHED["glm_image"]).parts
    vle = glm["vision_language_encoder"]
    assert size(glm["transformer"]) == 6_926_882_880
    assert size(vle) == 10_114_245_632
    assert size(vle) - size(vle.model.visual) - size(vle.model.vqmodel) == 8_914_788_352
    assert vle.model.language_model.rotary_emb.inv_freq.numel() == 32, "half of the 128 numbers of a head are turned"
    sdxl = read_networks("sdxl", PUBLISHED["sdxl"]).parts
    assert size(sdxl["unet"]) == 2_567_463_684
    assert size(sdxl["text_encoder_2"]) == 694_659_840 and size(sdxl["vae"]) == 83_653_863


def test_a_folder_is_read_from_its_own_files_and_says_so(tmp_path):
    read = read_networks("glm_image", "tiny")
    assert read.origin == "the configurations of tiny" and size(read.parts["transformer"]) == 4_056_608
    with pytest.raises(ModelLoadError, match="has no folders vision_language_encoder"):
        read_networks("glm_image", str(tmp_path))
    with pytest.raises(ModelLoadError, match="nobody/nothing is not in the local cache"):
        read_networks("glm_image", "nobody/nothing")
    with pytest.raises(ModelLoadError, match="families glm_image and sdxl"):
        read_networks("vgt", "tiny")


@pytest.mark.parametrize(
    "family, part, targets",
    [
        ("glm_image", "vision_language_encoder", AR_TARGETS),
        ("glm_image", "transformer", DIT_TARGETS),
        ("sdxl", "unet", UNET_TARGETS),
    ],
)
def test_adapters_are_those_that_are_added(family, part, targets):
    network = read_networks(family, "tiny-random").parts[part].to_empty(device="cpu")
    expected = counting.adapters(network, targets, 3)
    add_lora(network, targets, 3, 6.0)
    added = {name.replace(".default.", "."): tuple(p.shape) for name, p in adapter_parameters(network).items()}
    assert expected == added


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "prodigy", "lion", "muon", "adamw_schedule_free", "sgd"])
def test_moments_are_what_the_rules_keep(rule):
    if rule in EXTRAS and importlib.util.find_spec(EXTRAS[rule]) is None:
        pytest.skip(f"{EXTRAS[rule]} is not installed")
    config = load_config([str(ROOT / "configs/quickstart.yaml")], [])
    settings = replace(config.optimizer_for("dit"), name=rule)
    shapes = {"block.weight": (40, 30), "block.bias": (40,), "embed.weight": (50, 8), "conv.weight": (6, 5, 3, 3)}
    trained = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer(settings, trained, {})
    for param in trained.values():
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    kept = [
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    ]
    assert counting.moment_bytes(rule, shapes) == sum(kept)


def test_moments_of_eight_bits():
    """Two bytes and, by 256, two fp32 scales; small tensors stay in fp32."""
    assert counting.moment_bytes("adamw_8bit", {"a": (4096, 256)}) == 2 * (4096 * 256 + 4 * 4096)
    assert counting.moment_bytes("adamw_8bit", {"a": (64, 63)}) == 8 * 64 * 63


def test_sizes_of_passes_are_read_from_the_networks():
    parts = read_networks("glm_image", PUBLISHED["glm_image"]).parts
    dit, ar = counting.dit_sizes(parts["transformer"]), counting.ar_sizes(parts["vision_language_encoder"])
    assert (dit.layers, dit.width, dit.ratio) == (30, 4096, 4.0)
    assert (ar.layers, ar.width, ar.keys, ar.vocabulary, ar.codes) == (40, 4096, 256, 168_064, 16_512)
    assert math.isclose(ar.ratio, 13_696 / 4096) and ar.widest == 2 * 13_696 * 4096
    unet = counting.unet_sizes(read_networks("sdxl", PUBLISHED["sdxl"]).parts["unet"])
    assert [(each.channels, each.depth, each.scale) for each in unet.transformers] == [
        *[(640, 2, 2)] * 2, *[(1280, 10, 4)] * 2, (1280, 10, 4), *[(1280, 10, 4)] * 3, *[(640, 2, 2)] * 3,
    ]  # fmt: skip
    assert [each.inputs for each in unet.resnets if each.joined] == [2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640]
    assert len(unet.resnets) == 6 + 2 + 9
