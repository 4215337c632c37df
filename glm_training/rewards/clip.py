"""What the metrics on CLIP embeddings share: preprocessing, loading from local files, cosines of images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm_training.rewards.types import RewardBackendError, load_all
from glm_training.utils.hub_files import HubFiles, Wanted, hub_id, tokenizer_files, transformers_weights

CHUNK = 16
"""Images, or texts, per forward pass."""


def crop_square(images: torch.Tensor, side: int) -> torch.Tensor:
    """CLIP's own preprocessing: shorter side to ``side`` (bicubic), centre crop, normalise.

    images: [B, 3, H, W] float in [0, 1]. Returns [B, 3, side, side].
    """
    height, width = images.shape[-2:]
    size = (side * height // min(height, width), side * width // min(height, width))  # rounds as CLIP's does: down
    images = _resize(images, size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return _normalise(images[..., top : top + side, left : left + side])


def pad_square(images: torch.Tensor, side: int) -> torch.Tensor:
    """HPSv2's preprocessing: longer side to ``side`` (bicubic), black borders around the middle, normalise.

    images: [B, 3, H, W] float in [0, 1]. Returns [B, 3, side, side].
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    images = _resize(images, (max(1, round(height * scale)), max(1, round(width * scale))))
    rows, columns = side - images.shape[-2], side - images.shape[-1]
    borders = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return _normalise(F.pad(images, borders))


def squash_square(images: torch.Tensor, side: int) -> torch.Tensor:
    """DFN's preprocessing: both sides to ``side`` (bicubic) whatever their ratio, normalise.

    images: [B, 3, H, W] float in [0, 1]. Returns [B, 3, side, side].
    """
    return _normalise(_resize(images, (side, side)))


class _Clamp(torch.autograd.Function):
    """To [0, 1]; the gradient passes as if nothing was cut off.

    Bicubic weights overshoot at every edge, and on plain white by a rounding: those pixels would learn nothing.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return _Clamp.apply(F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False))


def _normalise(images: torch.Tensor) -> torch.Tensor:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (images.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def load_clip(name: str, metric: str, key: str, device: torch.device) -> Any:
    """transformers' CLIPModel ``name`` (hub id or folder) in fp32, frozen, on ``device``.

    Raises RewardBackendError with the command that fetches it and ``key``, the option under ``reward.options``.
    """
    from transformers import CLIPModel

    try:
        # Local files only: a run fetches what is missing before, once for all processes and with its checksum.
        clip = CLIPModel.from_pretrained(name, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise RewardBackendError(
            f"{metric}: CLIP model {name!r} is neither a folder nor in the local Hugging Face cache. Run "
            f"`hf download {name}`, or set reward.options.{key} to a folder that holds it"
        ) from error
    return clip.requires_grad_(False).eval().to(device)


def clip_files(name: str, metric: str) -> list[Wanted]:
    """What `load_clip` loads, where ``name`` is a hub id."""
    repository = hub_id(name)
    return [] if repository is None else [HubFiles(metric, repository, transformers_weights)]


def load_tokenizer(name: str, metric: str, key: str) -> Any:
    """transformers' CLIPTokenizer ``name`` (hub id or folder). Raises RewardBackendError like ``load_clip``."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        tokenizer = None
    # Without its files transformers does not fail: it hands out a tokenizer that knows its special tokens alone.
    if tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise RewardBackendError(
            f"{metric}: the tokenizer of {name!r} is neither in a folder of that name nor in the local Hugging Face "
            f'cache. Run `hf download {name} --include "*.json" "*.txt"`, or set reward.options.{key} to a folder '
            "that holds it"
        )
    return tokenizer


def image_embeddings(clip: Any, images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] on any device -> [B, width] fp32 embeddings of unit length on the model's device."""
    side = clip.config.vision_config.image_size
    rows = []
    with torch.no_grad():
        for chunk in images.split(CHUNK):
            pixels = crop_square(chunk.to(clip.device).float(), side)
            rows.append(clip.get_image_features(pixel_values=pixels).pooler_output.float())
    return F.normalize(torch.cat(rows), dim=-1)


def text_embeddings(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """B prompts -> [B, width] fp32 embeddings of unit length; what exceeds the model's length (77 tokens) is cut."""
    unique = list(dict.fromkeys(prompts))  # the images of a group share their prompt
    limit = clip.config.text_config.max_position_embeddings
    rows = []
    with torch.no_grad():
        for start in range(0, len(unique), CHUNK):
            texts = unique[start : start + CHUNK]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            features = clip.get_text_features(
                input_ids=tokens["input_ids"].to(clip.device), attention_mask=tokens["attention_mask"].to(clip.device)
            )
            rows.append(features.pooler_output.float())
    places = {text: row for row, text in enumerate(unique)}
    return F.normalize(torch.cat(rows), dim=-1)[[places[prompt] for prompt in prompts]]


class ClipPair:
    """A CLIP with its tokenizer, loaded on demand; every problem of the two is reported at once."""

    def __init__(self, metric: str, model: tuple[str, str], tokenizer: tuple[str, str], device: torch.device) -> None:
        """``model`` and ``tokenizer``: hub id or folder, and the option under ``reward.options`` that names it."""
        self._metric, self._model, self._tokenizer, self._device = metric, model, tokenizer, device
        self._loaded: tuple[Any, Any] | None = None

    def wanted(self) -> list[Wanted]:
        """The files of both."""
        words = hub_id(self._tokenizer[0])
        tokenizer = [] if words is None else [HubFiles(self._metric, words, tokenizer_files)]
        return [*clip_files(self._model[0], self._metric), *tokenizer]

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises RewardBackendError listing what is missing."""
        if self._loaded is None:
            (name, key), (words, words_key) = self._model, self._tokenizer
            tokenizer, clip = load_all(
                (
                    lambda: load_tokenizer(words, self._metric, words_key),
                    lambda: load_clip(name, self._metric, key, self._device),
                )
            )
            self._loaded = clip, tokenizer
        return self._loaded

    def cosines(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> [B] fp32 cosines on the CPU."""
        clip, tokenizer = self.load()
        return (image_embeddings(clip, images) * text_embeddings(clip, tokenizer, prompts)).sum(dim=-1).cpu()
