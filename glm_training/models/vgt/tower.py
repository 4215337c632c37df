"""Vision towers: pictures to the features a vision-language model reads, from Hugging Face's own modules.

B images of H x W px, a grid of h x w places (h = H / stride, w = W / stride, L = h * w), D the width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Tower(nn.Module):
    """What both towers share. `encoder` is the vision transformer, `stride` how many pixels a place of the grid covers.

    statistics: mean and standard deviation per colour that the encoder was trained with.
    """

    encoder: Any
    stride: int
    mean: Tensor
    std: Tensor

    def __init__(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        mean, std = statistics
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of images [B, 3, H, W]. Raises ValueError unless both sides are multiples of the stride."""
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.stride or width % self.stride:
            raise ValueError(
                f"images must be [B, 3, H, W] with sides that are multiples of {self.stride}, got {list(images.shape)}"
            )
        return height // self.stride, width // self.stride

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the encoder wants them, fp32. The range is not guessed from the values: a dark picture is
        as good as any."""
        return (images.float() - self.mean) / self.std


class InternVLTower(Tower):
    """InternVL's vision transformer, its pixel shuffle, and the projector of its checkpoints (mlp1 in the paper).

    config: keyword arguments of `InternVLVisionConfig`. Dropout is off, whatever the config says: the teacher must see
    what the student sees.
    """

    def __init__(self, config: dict[str, Any], hidden_size: int) -> None:
        super().__init__(_IMAGENET)
        off = dict(hidden_dropout_prob=0.0, attention_dropout=0.0, projection_dropout=0.0)
        options = {**config, **off}
        self.encoder = InternVLVisionModel(InternVLVisionConfig(**options))
        whole = InternVLConfig(vision_config=options, text_config={"model_type": "qwen2", "hidden_size": hidden_size})
        self.projector = InternVLMultiModalProjector(whole)
        self.stride = 2 * self.encoder.config.patch_size[0]

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, L, D] of images [B, 3, H, W] in [0, 1]."""
        height, width = self.grid(images)
        hidden = self.encoder(pixel_values=self.normalised(images)).last_hidden_state[:, 1:]  # without CLS
        shuffled = pixel_shuffle(hidden.unflatten(1, (2 * height, 2 * width)))
        return self.projector(shuffled.to(self.projector.linear_1.weight.dtype))


class Qwen25VLTower(Tower):
    """Qwen2.5-VL's `visual`. Its merger makes one of 2 x 2 patches, so there is no projector beside the encoder.

    config: keyword arguments of `Qwen2_5_VLVisionConfig`; `out_hidden_size` is set to `hidden_size`.
    """

    def __init__(self, config: dict[str, Any], hidden_size: int) -> None:
        super().__init__(_CLIP)
        vision = Qwen2_5_VLVisionConfig(**{**config, "out_hidden_size": hidden_size})
        self.encoder = Qwen2_5_VisionTransformerPretrainedModel(vision)
        self.stride = vision.spatial_merge_size * vision.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, L, D] of images [B, 3, H, W] in [0, 1]."""
        height, width = self.grid(images)
        vision = self.encoder.config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        patches = self.normalised(images).unflatten(2, (height, merge, patch)).unflatten(5, (width, merge, patch))
        # the merger joins neighbours in the sequence, so the patches of a place stand together
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # [B*h*w*m*m, 3, patch, patch]
        frames = patches.unsqueeze(2).expand(-1, -1, vision.temporal_patch_size, -1, -1)  # one picture as a still film
        grids = torch.tensor([[1, height * merge, width * merge]] * len(images), device=images.device)
        return self.encoder(frames.flatten(1), grid_thw=grids).pooler_output.unflatten(0, (len(images), -1))


TOWERS: dict[str, type[InternVLTower] | type[Qwen25VLTower]] = {
    "internvl": InternVLTower,
    "qwen2_5_vl": Qwen25VLTower,
}


def pixel_shuffle(features: Tensor) -> Tensor:
    """[B, 2h, 2w, c] to [B, h * w, 4c]: each 2 x 2 block side by side, its upper row first."""
    blocks = features.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, c]
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)
