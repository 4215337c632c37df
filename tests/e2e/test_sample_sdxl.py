"""`glm-train sample` with an SDXL folder and its adapters."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image, ImageChops

from glm_training.cli.main import main
from glm_training.models.lora import adapter_parameters, add_lora
from glm_training.models.sdxl.family import SDXL


@pytest.fixture
def folders(tmp_path):
    """A pipeline folder of a tiny SDXL and one of an adapter for it."""
    SDXL.load("tiny-random", seed=1).save_pretrained(tmp_path / "pipeline")
    adapted = SDXL.load("tiny-random", seed=1)
    add_lora(adapted.module("unet"), adapted.lora_targets("unet"), 4, 8.0)
    for weight in adapter_parameters(adapted.module("unet")).values():
        torch.nn.init.constant_(weight, 0.2)
    adapted.save_lora("unet", tmp_path / "adapter")
    return tmp_path


def sampled(folder, monkeypatch, *options: str) -> tuple[int, str]:
    out = folder / "out"
    words = ["sample", "--model", str(folder / "pipeline"), "--prompt", "a cat", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["glm-train", *words, *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, str(out / "0-0.png")


def test_the_folder_says_what_it_is_and_the_adapter_counts(folders, monkeypatch) -> None:
    code, path = sampled(folders, monkeypatch)
    assert code == 0
    plain = Image.open(path).convert("RGB")
    assert plain.size == (64, 64)
    code, path = sampled(folders, monkeypatch, "--lora", f"unet={folders / 'adapter'}")
    assert code == 0
    assert Image.open(path).convert("RGB").tobytes() == plain.tobytes()  # the first picture stays
    adapted = path.replace("0-0", "1-0")
    assert ImageChops.difference(plain, Image.open(adapted).convert("RGB")).getbbox() is not None


def test_wrong_adapters_are_explained(folders, monkeypatch, capsys) -> None:
    assert sampled(folders, monkeypatch, "--lora", f"unet={folders / 'none'}")[0] == 2
    assert "there are no adapters in" in capsys.readouterr().err
    assert sampled(folders, monkeypatch, "--lora", f"dit={folders / 'adapter'}")[0] == 2
    assert "write unet=FOLDER" in capsys.readouterr().err
