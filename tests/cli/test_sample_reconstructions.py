"""`glm-train sample` on a VGT that has an autoencoder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.cli.main import main
from glm_training.data import load_image
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import Models
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder
from glm_training.models.vgt.tiny_generator import tiny_random_generator
from tests.vgt_runs import write_pictures


@pytest.fixture
def sampled(monkeypatch) -> Callable[..., int]:
    """The exit status of the command with such arguments."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["glm-train", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_given_pictures_are_drawn_again(tmp_path: Path, sampled) -> None:
    VGT(Models(tiny_random_autoencoder(1))).save_pretrained(tmp_path / "vgt")
    pictures = write_pictures(tmp_path / "pictures", 2)
    sources = [pictures / "0.png", pictures / "1.png"]
    options = [word for source in sources for word in ("--source", source, "--prompt", "x")]
    assert sampled("--model", tmp_path / "vgt", *options, "--dtype", "float32", "--out", tmp_path / "out") == 0
    wanted = tiny_random_autoencoder(1)(torch.stack([load_image(source, 32, 32) for source in sources])).images
    for number, image in enumerate(wanted.detach().clamp(0, 1)):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{number}-0.png")).transpose(2, 0, 1) / 255
        assert np.abs(drawn - image.numpy()).max() <= 0.51 / 255, "no further than 8 bits round"


def test_what_a_model_cannot_draw_is_told_with_what_to_do(tmp_path: Path, sampled, capsys) -> None:
    VGT(Models(tiny_random_autoencoder(1))).save_pretrained(tmp_path / "alone")
    VGT(Models(tiny_random_autoencoder(1), generator=tiny_random_generator(seed=2))).save_pretrained(tmp_path / "both")
    source = write_pictures(tmp_path / "pictures", 1) / "0.png"
    assert sampled("--model", tmp_path / "alone", "--prompt", "x", "--out", tmp_path / "out") == 2
    assert "give one with each prompt (--source" in capsys.readouterr().err
    assert sampled("--model", tmp_path / "both", "--prompt", "x", "--source", source, "--out", tmp_path / "out") == 2
    assert "leave those out (--source" in capsys.readouterr().err
