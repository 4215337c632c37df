"""A dense reward for comparing methods in minutes: how warm the colours of a picture are."""

import numpy as np
from PIL import Image

from glm_training.rewards import RewardCalculator


class Warmth(RewardCalculator):
    """Mean of red minus mean of blue, over 255: -1 (blue) to 1 (yellow and red), 0 for grey."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        pixels = np.asarray(generated_image.convert("RGB"), dtype=np.float32)
        return float((pixels[..., 0] - pixels[..., 2]).mean() / 255)
