"""The picture by which an export is held against its run: what is drawn, by whom, and what the run itself drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from glm_training.config import Config
from glm_training.data import DataError, ImageDataset
from glm_training.engine import setup
from glm_training.engine.captioned_setup import build_captioned, build_held_out_images
from glm_training.engine.families import evaluation_sampling
from glm_training.export.source import Kind, Source
from glm_training.models.family import Family, Sampling
from glm_training.models.glm_image.family import GLMImage
from glm_training.utils.prompt_lines import read_prompts
from glm_training.utils.randomness import make_generator, normal, uniform

PICTURES = 2
FALLBACK = ("a red circle", 'a sign that says "CAFE"')
"""Prompts where the run's own are not here."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn: the first of a run's evaluation prompts, in its way. `rows`: their places there. `sources`
    [P, 3, H, W] in [0, 1]: what is drawn again, or edited. `of_the_run`: they are the run's own."""

    prompts: list[str]
    rows: list[int]
    height: int
    width: int
    seed: int
    sampling: Sampling
    sources: Tensor | None
    of_the_run: bool

    def by(self, family: Family) -> Tensor:
        """[P, 3, H, W] in [0, 1], drawn as the trainer draws.

        Weights leave their file first: where its header is of another length they lie at other addresses, and a
        product's last bit depends on how its operands are aligned.
        """
        for module in (*map(family.module, family.components), *family.frozen()):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
        drawn = family.eval().draw(
            self.prompts,
            height=self.height,
            width=self.width,
            seed=self.seed,
            sampling=self.sampling,
            sources=self.sources,
            prompt_ids=self.rows,
        )
        return drawn.float().cpu()

    def as_json(self) -> dict[str, Any]:
        """All but the sources, which are tensors."""
        return {**asdict(self), "sources": None, "sampling": asdict(self.sampling)}

    @staticmethod
    def of_json(tree: dict[str, Any], sources: Tensor | None) -> Drawing:
        return Drawing(**{**tree, "sampling": Sampling(**tree["sampling"]), "sources": sources})


def drawing_of(source: Source) -> Drawing:
    """The first `PICTURES` of the run's samples that have one size; without those, prompts of this module."""
    config, samples = source.config, source.samples
    size = config.data.image_size.height, config.data.image_size.width
    prompts, rows = list(FALLBACK), list(range(PICTURES))
    every = [] if samples is None else _listed(samples)
    if every:
        size = every[0][1]
        rows = [row for row in range(len(every)) if every[row][1] == size][:PICTURES]
        prompts = [every[row][0] for row in rows]
    sources, own = None, True
    if config.training.mode == "i2i" or config.model.component == "autoencoder":
        sources = _own_sources(config, rows)
        own = sources is not None
        if sources is None:  # any picture tells a wrong weight
            sources = uniform(0, "export/sources", [(row,) for row in rows], (3, *size))
    sampling = evaluation_sampling(config)
    return Drawing(prompts, rows, *size, config.evaluation.seed, sampling, sources, own and bool(every))


def _listed(samples: Path) -> list[tuple[str, tuple[int, int]]]:
    """The prompts of a step's samples with height and width of their pictures; none where those are not all here."""
    prompts, sizes = read_prompts(samples), []
    if sum(path.stem.isdecimal() for path in samples.glob("*.png")) != len(prompts):
        return []
    for row in range(len(prompts)):
        try:
            with Image.open(samples / f"{row}.png") as image:
                image.load()
        except (OSError, ValueError, SyntaxError):  # cut short, or no picture
            return []
        sizes.append((image.height, image.width))
    return list(zip(prompts, sizes, strict=True))


def _own_sources(config: Config, rows: Sequence[int]) -> Tensor | None:
    """The pictures that the run edited or drew again in its evaluations; None where its data are not here."""
    try:
        held_out: ImageDataset
        if config.model.component == "autoencoder":
            training = build_captioned(config, captions=False)
            held_out = build_held_out_images(config, training, captions=False, as_sources=True)
        elif config.data.images is not None:
            training = build_captioned(config, captions=True)
            held_out = build_held_out_images(config, training, captions=True)
        else:
            held_out = setup.build_evaluation_dataset(config, setup.build_dataset(config))
        return held_out.batch(list(rows)).sources
    except (DataError, OSError):
        return None


def own_pictures(source: Source, drawing: Drawing, kind: Kind) -> Tensor | None:
    """What the run drew of this, [P, 3, H, W] in [0, 1] in 8 bits; None where it is not here, or of other weights."""
    ema = source.config.training.ema
    shown = source.chosen(None)
    if shown != "shown" and ema.decay is not None:
        shown = "average" if ema.evaluate else "weights"
    if source.samples is None or not drawing.of_the_run or kind != shown:
        return None
    pictures = []
    for row in drawing.rows:
        with Image.open(source.samples / f"{row}.png") as image:
            pictures.append(pil_to_tensor(image.convert("RGB")).float() / 255)
    return torch.stack(pictures)


@torch.no_grad()
def stock_picture(pipe: Any, family: Family, drawing: Drawing) -> Tensor | None:
    """The first picture [3, H, W] drawn by the stock pipeline's own call, given the trainer's noise, and for GLM-Image
    the tokens that its AR half wrote with the trainer's draws; None for edits, which the stock pipeline fails at, and
    for VGT."""
    if drawing.sources is not None or family.components[0] not in ("ar", "unet"):
        return None
    prompt, row, sampling, seed = drawing.prompts[0], drawing.rows[0], drawing.sampling, drawing.seed
    size = drawing.height, drawing.width
    options: dict[str, Any] = {"height": size[0], "width": size[1], "guidance_scale": sampling.guidance_scale}
    options |= {"num_inference_steps": sampling.num_inference_steps, "output_type": "pt"}
    few = family.few_steps
    if isinstance(family, GLMImage):
        asked = family.ar.encode_prompts([prompt], *size)
        draws = uniform(seed, "generate/tokens", [(row, 0)], (asked.T,))
        rollout = family.ar.rollout(
            asked, 1, draws, temperature=sampling.temperature, top_p=sampling.top_p, do_sample=sampling.do_sample
        )
        options["latents"] = normal(seed, "generate/latents", [(row, 0, 0)], family.dit.latent_shape(*size))
        grid = (size[0] // 32, size[1] // 32)
        options["prior_token_ids"] = pipe._upsample_token_ids(rollout.large_tokens, *grid)
    else:
        shape = family.component("unet").latent_shape(*size)
        options["latents"] = normal(seed, "generate/latents", [(row, 0)], shape)
        options["generator"] = [make_generator(seed, "generate/steps", row, 0)]
        if few is not None and few.steps == 1 and few.one_step_timestep is not None:
            del options["num_inference_steps"]
            options["timesteps"] = [few.one_step_timestep]
    pipe.set_progress_bar_config(disable=True)
    return pipe([prompt], **options).images[0].float().cpu()
