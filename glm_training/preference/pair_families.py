"""What each model family makes of preference pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glm_training.config import Config
from glm_training.data.preference.dataset import ImageRows, PreferencePair
from glm_training.engine.encoded_cache import weights_fingerprint
from glm_training.models.family import Family
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.types import SDXLText, UNetCondition, add_time_ids
from glm_training.preference.encoded_pairs import Encoded, EncodedPairs, PairEncoder
from glm_training.utils.distributed import World

_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "architectures"}
"""Not what a model computes; the dtype is told with the weights."""


def _settings(*models: AutoencoderKL | PreTrainedModel) -> list[Any]:
    """What their configs say of the models; the rest is how they were made, and differs from process to process."""
    return [
        _public(model.config.to_dict() if isinstance(model, PreTrainedModel) else dict(model.config))
        for model in models
    ]


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {str(name): item for name, item in value.items() if not str(name).startswith("_")}
        return {name: _public(item) for name, item in kept.items() if name not in _INCIDENTAL}
    return [_public(item) for item in value] if isinstance(value, list | tuple) else value


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Vocabulary, merges, normalisation and lengths."""
    assert isinstance(tokenizer, CLIPTokenizer)  # SDXL has no other
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in told.items() if name not in ("padding", "truncation")}  # of the last call
    return [type(tokenizer).__name__, model, tokenizer.model_max_length, tokenizer.pad_token]


class SDXLPairs(PairEncoder):
    """Latents (the mode of the VAE's posterior) and micro-conditioning of each image, both encoders' view of a prompt.

    A prompt that is dropped is what guidance leads away from in sampling: zeros, or the empty prompt of a model that
    takes that.
    """

    def __init__(self, config: Config, family: SDXL, world: World) -> None:
        super().__init__(config, world)
        self.unet = family.unet

    def encode_images(self, images: ImageRows) -> Encoded:
        latents = self.unet.encode_images(images.pixels, micro_batch_size=self.config.dpo.vae_batch_size)
        return {"latents": latents}

    def encode_texts(self, prompts: Sequence[str]) -> Encoded:
        text = self.unet.encode_prompts(prompts)
        return {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}

    def fingerprints(self) -> dict[str, str]:
        unet = self.unet
        encoders = [unet.text_encoder, unet.text_encoder_2]
        tokenizers = [_tokenizer(tokenizer) for tokenizer in (unet.tokenizer, unet.tokenizer_2)]
        return {
            "image": weights_fingerprint([unet.vae], "posterior mode", *_settings(unet.vae)),
            "text": weights_fingerprint(encoders, *_settings(*encoders), *tokenizers),
        }

    def texts(self, prompts: Sequence[str]) -> list[str]:
        needs_empty = self.config.dpo.prompt_dropout > 0 and not self.unet.force_zeros_for_empty_prompt
        return [*prompts, *([""] if needs_empty else [])]

    def sleepers(self) -> list[nn.Module]:
        return self.unet.frozen()

    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        device, prompts = self.world.device, [pair.prompt for pair in pairs]
        dropped = [False] * len(pairs) if drop is None else drop.tolist()
        blank = self.unet.force_zeros_for_empty_prompt
        texts = [prompt if blank or not gone else "" for prompt, gone in zip(prompts, dropped, strict=True)]
        rows = {name: tensor.to(device) for name, tensor in self.text_rows(texts).items()}
        if blank and any(dropped):
            kept = ~torch.tensor(dropped, device=device)
            rows = {name: tensor * kept.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in rows.items()}
        text = SDXLText(rows["prompt_embeds"], rows["pooled"])
        ids = add_time_ids(images["original_sizes"], images["crops"], self.size, rows=len(images["crops"]))
        if self.rejected:
            text = SDXLText.cat([text, text])
        return EncodedPairs(pairs, images["latents"].to(device), UNetCondition(text, ids.to(device)))


class GLMPairs(PairEncoder):
    """Each image's own tokens, which the AR half is to write and the DiT half draws under, and its latents.

    A prompt that is dropped leaves the DiT half without tokens and quoted words, as in sampling; the AR half, which has
    no guidance, reads every prompt.
    """

    def __init__(self, config: Config, family: GLMImage, world: World) -> None:
        super().__init__(config, world)
        self.family = family
        self.grids = family.ar.grids(*self.size, "t2i")
        self.trains_ar, self.trains_dit = ("ar" in config.parts(), "dit" in config.parts())

    def encode_images(self, images: ImageRows) -> Encoded:
        at_once = self.config.dpo.vae_batch_size
        tokens = [
            torch.cat([self.family.ar.tokenize_images(part, grid) for grid in self.grids], dim=1)
            for part in images.pixels.split(at_once)
        ]
        encoded = {"tokens": torch.cat(tokens)}
        if self.trains_dit:
            encoded["latents"] = self.family.dit.encode_images(images.pixels, micro_batch_size=at_once)
        return encoded

    def encode_texts(self, prompts: Sequence[str]) -> Encoded:
        return {}

    def fingerprints(self) -> dict[str, str]:
        model, dit = self.family.ar.model.model, self.family.dit
        modules: list[nn.Module] = [model.visual, model.vqmodel]
        processor = self.family.ar.processor.image_processor.to_json_string()
        facts: list[Any] = [processor, self.trains_dit, *_settings(model.visual, model.vqmodel)]
        if self.trains_dit:
            modules.append(dit.vae)
            facts += _settings(dit.vae)
        return {"image": weights_fingerprint(modules, *facts)}

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return []

    def sleepers(self) -> list[nn.Module]:
        """A half that is not trained sleeps whole. The encoder of quoted words stays: it reads them as they come."""
        model, dit = self.family.ar.model.model, self.family.dit
        ar: list[nn.Module] = [model.visual, model.vqmodel] if self.trains_ar else [self.family.ar]
        return [*ar, dit.vae] if self.trains_dit else [*ar, dit]

    def assemble(self, pairs: list[PreferencePair], images: Encoded, drop: Tensor | None) -> EncodedPairs:
        device, prompts, grid = self.world.device, [pair.prompt for pair in pairs], self.grids[-1]
        encoded, tokens = EncodedPairs(pairs), images["tokens"].to(device)
        copies = 2 if self.rejected else 1
        if self.trains_dit:
            encoded.clean = images["latents"].to(device)
            condition = self.family.dit.condition(prompts * copies, tokens[:, -grid[0] * grid[1] :], grid)
            if drop is not None and bool(drop.any()):
                condition = self.family.dit.drop_condition(condition, drop.repeat(copies))
            encoded.condition = condition
        if self.trains_ar:
            encoded.tokens = tokens
            rows = torch.arange(len(pairs), device=device).repeat(copies)
            encoded.prompt = self.family.ar.encode_prompts(prompts, *self.size).select(rows)
        return encoded


ENCODERS: dict[str, Callable[..., PairEncoder]] = {"glm_image": GLMPairs, "sdxl": SDXLPairs}
"""By `model.family`: what makes of pairs what its losses read."""


def build_encoder(config: Config, family: Family, world: World) -> PairEncoder:
    """The encoder of the family."""
    return ENCODERS[config.model.family](config, family, world)
