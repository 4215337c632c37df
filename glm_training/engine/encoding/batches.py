"""From batches and data sets to what is encoded of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from glm_training.data import Batch, ImageDataset
from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.examples import ImageRows, View
from glm_training.engine.encoding.ahead import Encoding, Load
from glm_training.models.glm_image.ar_types import EncodedSources
from glm_training.models.glm_image.positions import image_grid
from glm_training.models.sdxl.types import SDXLText
from glm_training.models.sdxl.unet import UNetComponent


def pictures_of(
    data: Iterable[ImageDataset | CaptionedImages], encoding: Encoding, *, targets: bool
) -> dict[View, Load]:
    """Every picture that batches of `data` may show, with what decodes it: sources, and `targets` where asked for."""
    found: dict[View, Load] = {}
    for one in data:
        if isinstance(one, CaptionedImages):
            one.survey(encoding.is_encoded)
        known = one.contents if isinstance(one, CaptionedImages) else one
        found |= dict.fromkeys(known.views(targets=targets), known.load)
    return found


def prompts_of(data: Iterable[ImageDataset | CaptionedImages]) -> list[str]:
    """The prompts that batches of `data` may have, each once; of captioned pictures after `pictures_of`."""
    found: dict[str, None] = {}
    for one in data:
        if isinstance(one, CaptionedImages):
            found |= dict.fromkeys([*one.contents.prompts(), *([""] if one.captioning.dropout > 0 else [])])
        else:
            found |= dict.fromkeys(one.prompts())
    return list(found)


def target_rows(batch: Batch) -> ImageRows | None:
    """The targets of a batch with their sizes; None where it does not bring their pixels."""
    if batch.targets is None or batch.original_sizes is None or batch.crops is None:
        return None
    return ImageRows(batch.targets, batch.original_sizes, batch.crops)


def sdxl_text(
    encoding: Encoding, unet: UNetComponent, prompts: Sequence[str], dropped: Sequence[bool], device: torch.device
) -> SDXLText:
    """The prompts as SDXL's UNet reads them, on the device. One that is dropped is what guidance leads away from in
    sampling: zeros, or the empty prompt of a model that takes that."""
    blank = unet.force_zeros_for_empty_prompt
    texts = [prompt if blank or not gone else "" for prompt, gone in zip(prompts, dropped, strict=True)]
    rows = {name: tensor.to(device) for name, tensor in encoding.text_rows(texts).items()}
    if blank and any(dropped):
        kept = ~torch.tensor(list(dropped), device=device)
        rows = {name: tensor * kept.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in rows.items()}
    return SDXLText(rows["prompt_embeds"], rows["pooled"])


def encoded_sources(encoding: Encoding, batch: Batch) -> EncodedSources | None:
    """The source images of a batch as both halves of GLM-Image read them; None for text-to-image."""
    rows = None
    if batch.sources is not None:
        unknown = torch.zeros(len(batch.sources), 2, dtype=torch.long)  # no encoder of theirs asks
        rows = ImageRows(batch.sources, unknown, unknown)
        size = (batch.sources.shape[-2], batch.sources.shape[-1])
    elif batch.source_views:
        size = batch.source_views[0].size
    else:
        return None
    found = encoding.shown(batch.source_views, rows)
    return EncodedSources(found["tokens"], image_grid(*size), found.get("latents"))
