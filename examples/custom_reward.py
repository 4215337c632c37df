"""A reward of your own: how much of the picture has the colour that the prompt names.

One method is enough. As the whole reward, or as one metric among others, in YAML:

    reward: {calculator: "examples.custom_reward:NamedColour"}
    reward: {metrics: {"examples.custom_reward:NamedColour": 0.5, text_accuracy: 0.5}}

Run it from the repository's root: python examples/custom_reward.py
"""

import sys

import numpy as np
import torch
from PIL import Image, ImageColor

from glm_training.rewards import RewardBatch, RewardCalculator, RewardSampleError

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "gray")


class NamedColour(RewardCalculator):
    """Share of pixels, in [0, 1], to which the prompt's first colour word is the nearest of ``COLOURS``."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        named = [word for word in prompt.lower().split() if word in COLOURS]
        if not named:
            raise RewardSampleError(f"the prompt names none of {', '.join(COLOURS)}")
        palette = np.array([ImageColor.getrgb(colour) for colour in COLOURS])
        pixels = np.asarray(generated_image.resize((32, 32))).reshape(-1, 1, 3).astype(int)
        nearest = ((pixels - palette) ** 2).sum(axis=2).argmin(axis=1)
        return float((nearest == COLOURS.index(named[0])).mean())


if __name__ == "__main__":
    left_half_red = torch.ones(2, 3, 64, 64)
    left_half_red[:, 1:, :, :32] = 0
    result = NamedColour().compute_rewards(RewardBatch(left_half_red, ["a red door", "a blue door"]))
    sys.stdout.write(f"a red door: {result.total[0]:.2f}, a blue door: {result.total[1]:.2f}\n")
