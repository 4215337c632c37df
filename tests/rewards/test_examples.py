"""The rewards in examples/ score as their docstrings say."""

import io
from pathlib import Path

import torch
from PIL import Image

from glm_training.rewards import RewardBatch, build_calculator
from glm_training.rewards.types import to_pil

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_compressibility_is_one_minus_the_bytes_per_pixel(picture: torch.Tensor, noise: torch.Tensor) -> None:
    calculator = build_calculator(f"{EXAMPLES / 'compressibility_reward.py'}:Compressibility", {})
    images = torch.cat([torch.zeros_like(picture), picture, noise])
    flat, drawn, noisy = calculator.compute_rewards(RewardBatch(images, ["a"] * 3)).total.tolist()
    file = io.BytesIO()
    Image.Image.save(to_pil(picture)[0], file, "JPEG", quality=95)
    assert drawn == 1 - len(file.getvalue()) / 128**2
    assert 0.9 < flat < 1 and flat > drawn > noisy and -0.3 < noisy < 0


def test_compressibility_does_not_depend_on_the_resolution(noise: torch.Tensor) -> None:
    calculator = build_calculator(f"{EXAMPLES / 'compressibility_reward.py'}:Compressibility", {})
    large = noise.repeat(1, 1, 4, 4)
    one, four = (calculator.compute_rewards(RewardBatch(images, ["a"])).total.item() for images in (noise, large))
    assert abs(one - four) < 0.06


def test_rewards_to_be_hacked_are_won_by_white_and_by_stripes() -> None:
    """A black picture with three white columns of eight, of which one stands at the edge: 3/8 white, 5 of 7 steps."""
    columns = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 0]).expand(1, 3, 8, 8)
    batch = RewardBatch(torch.cat([columns, torch.ones_like(columns)]), ["a"] * 2)
    path = EXAMPLES / "hackable_rewards.py"
    bright, sharp = (build_calculator(f"{path}:{name}", {}) for name in ("Brightness", "Sharpness"))
    torch.testing.assert_close(bright.compute_rewards(batch).total, torch.tensor([3 / 8, 1.0]))
    torch.testing.assert_close(sharp.compute_rewards(batch).total, torch.tensor([5 / 7, 0.0]))
