"""What a model writes for others: the same bytes in every process, open to whom the umask lets in."""

from __future__ import annotations

import json
import os

import pytest

from glm_training.models.family import Family
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.lora import add_lora
from glm_training.models.sdxl.family import LORA_FILE, SDXL

# a set of eight names comes out sorted by chance once in 40320 times
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "linear_1", "linear_2"]


@pytest.fixture(scope="module", params=["ar", "dit", "unet"])
def adapted(request) -> tuple[str, Family]:
    family: Family = SDXL.load("tiny-random") if request.param == "unet" else GLMImage.load("tiny-random")
    targets = TARGETS if request.param == "unet" else family.lora_targets(request.param)
    add_lora(family.module(request.param), targets, rank=2, alpha=4)
    return request.param, family


def test_every_file_follows_the_umask(adapted, tmp_path) -> None:
    part, family = adapted
    before = os.umask(0o027)
    try:
        (tmp_path / "out").mkdir()
        family.save_pretrained(tmp_path / "out/pipeline", merge_lora=True)
        family.save_lora(part, tmp_path / "out/lora")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_adapter_settings_have_one_order(adapted, tmp_path) -> None:
    part, family = adapted
    family.save_lora(part, tmp_path)
    if part == "unet":
        data = (tmp_path / LORA_FILE).read_bytes()
        told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert list(told) == ["format", "lora_adapter_metadata"]
        settings = json.loads(told["lora_adapter_metadata"])
        targets = settings["unet.target_modules"]
        assert targets == sorted(TARGETS)
    else:
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        targets = settings["target_modules"]
        assert targets == sorted(family.lora_targets(part)) and len(targets) > 3
    assert list(settings) == sorted(settings)
