"""Text-to-image examples: a prompt and, for rewards that compare, its target image."""

from typing import ClassVar

from glm_training.data.dataset import ImageDataset


class T2IDataset(ImageDataset):
    """Batches of prompts with targets ``[B, 3, H, W]`` or None; ``sources`` is always None."""

    has_sources: ClassVar[bool] = False
