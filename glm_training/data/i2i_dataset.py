"""Image-to-image examples: a source image, the prompt that edits it and, for rewards that compare, the target."""

from typing import ClassVar

from glm_training.data.dataset import ImageDataset


class I2IDataset(ImageDataset):
    """Batches of prompts with sources ``[B, 3, H, W]``, and targets ``[B, 3, H, W]`` or None.

    Source and target are fitted alike and flipped together, so that pixels that match on disk match in the batch when
    both files have the same aspect ratio.
    """

    has_sources: ClassVar[bool] = True
