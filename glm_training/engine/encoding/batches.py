"""From batches and data sets to what is encoded of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from glm_training.data import Batch, ImageDataset
from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.examples import ImageRows, View
from glm_training.engine.encoding.ahead import Encoding, Load, Progress
from glm_training.models.glm_image.ar_types import EncodedSources
from glm_training.models.glm_image.positions import image_grid
from glm_training.models.sdxl.types import SDXLText
from glm_training.models.sdxl.unet import UNetComponent
from glm_training.utils.console import Console

SAMPLED = 256
"""Captioned pictures that say how much room all of them will take, where there are many times as many."""


def coming(
    data: ImageDataset | CaptionedImages, indices: Sequence[int] | None = None, *, targets: bool
) -> tuple[dict[View, Load], list[str]]:
    """What batches of all items, or of those at `indices`, may show: every picture with what decodes it (sources, and
    `targets` where asked for), and every prompt. Captioned pictures are those that `survey` has read."""
    if isinstance(data, CaptionedImages):
        known = data.contents
        prompts = [*known.prompts(), *([""] if data.captioning.dropout > 0 else [])]
        return dict.fromkeys(known.views(targets=targets), known.load), prompts
    return dict.fromkeys(data.views(indices, targets=targets), data.load), data.prompts(indices)


def survey(
    data: CaptionedImages,
    encoding: Encoding,
    indices: Sequence[int] | None,
    console: Console,
    on_step: Callable[[], None],
) -> None:
    """Reads the pictures, or those at `indices`, to know them by content; `on_step` is called now and then, equally
    often on every process, and may raise. Raises TrainingError, on every process, where the disk has no room for what
    is to be expected of them."""
    wanted = range(len(data)) if indices is None else indices
    if len(wanted) > 4 * SAMPLED:
        sample = [wanted[place * len(wanted) // SAMPLED] for place in range(SAMPLED)]
        data.survey(encoding.is_encoded, sample)
        encoding.expect_room(data.contents.views(), SAMPLED / len(wanted))
    progress = Progress(console, len(wanted), "read")
    done = 0

    def on_read() -> None:
        nonlocal done
        progress.add(1)
        done += 1
        if done % SAMPLED == 0:
            on_step()

    data.survey(encoding.is_encoded, wanted, on_read)


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
