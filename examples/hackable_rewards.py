"""Rewards that can be had without drawing what is asked for, to see the monitors of a run trip (docs/monitors.md).

Both look at no prompt. `Brightness` is largest for a white picture, `Sharpness` for stripes; real scores of beauty or
quality have such a taste too, among others.

    python train.py --config configs/quickstart.yaml output_dir=runs/hacked reward.metrics=null \\
      reward.monitors.action=stop reward.calculator=examples/hackable_rewards.py:Brightness

Run it from the repository's root: python examples/hackable_rewards.py
"""

import sys

import numpy as np
import torch
from PIL import Image

from glm_training.rewards import RewardBatch, RewardCalculator


class Brightness(RewardCalculator):
    """Mean of all pixels and channels: 0 for black, 1 for white."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        return float(np.asarray(generated_image.convert("RGB")).mean() / 255)


class Sharpness(RewardCalculator):
    """Mean difference between horizontal neighbours, in grey levels: 0 for a flat picture, 1 for black and white
    columns."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        grey = np.asarray(generated_image.convert("L")).astype(int)
        return float(np.abs(np.diff(grey, axis=1)).mean() / 255)


if __name__ == "__main__":
    columns = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    for reward in (Brightness(), Sharpness()):
        white, striped = reward.compute_rewards(RewardBatch(torch.cat([columns * 0 + 1, columns]), ["a", "b"])).total
        sys.stdout.write(f"{type(reward).__name__}: white {white:.2f}, black and white columns {striped:.2f}\n")
