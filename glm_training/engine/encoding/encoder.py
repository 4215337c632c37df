"""What the frozen parts of a model say of one picture or one text: each family's, and by what it is known again.

Pictures of H x W px, latents [C, h, w], T tokens, G tokens of a text of width D.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glm_training.config import Config
from glm_training.engine.encoding.cache import weights_fingerprint
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.glyph import MAX_SPAN_TOKENS, encode_spans, glyph_texts, glyph_token_bound
from glm_training.models.sdxl.family import SDXL

Encoded = dict[str, Tensor]
Kind = Literal["image", "text"]

HEADER_BYTES = 600
"""About what an entry takes on disk besides its tensors."""

_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "architectures"}
"""Not what a model computes; the dtype is told with the weights."""


class FrozenEncoder(ABC):
    """The frozen parts of a family that look at pictures and texts, always at one at a time: what else is in a pass
    moves its last bits, and then two runs that share a cache, or one with a cache and one without, would not train on
    the same numbers. `text_noun`: what a text is called."""

    text_noun: str

    @abstractmethod
    def picture(self, pixels: Tensor) -> Encoded:
        """Tensors by name of one picture, `pixels` [1, 3, H, W] in [0, 1]; without gradient."""

    @abstractmethod
    def text(self, text: str) -> Encoded:
        """Tensors by name of one of `texts`; without gradient."""

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> list[str]:
        """What is encoded for prompts, each once, and what training needs besides."""

    @abstractmethod
    def fingerprint(self, kind: Kind) -> str:
        """What the encoders of pictures or of texts are, weights included."""

    @abstractmethod
    def sleepers(self, *, pictures: bool) -> list[nn.Module]:
        """The modules that training steps do not use once every text, and with `pictures` every picture, is encoded."""

    def serve(self, found: Callable[[str], Encoded]) -> None:  # noqa: B027  (most are asked for texts by their trainers)
        """From here on the model takes what `text` gives from `found`."""

    @abstractmethod
    def picture_bytes(self, height: int, width: int) -> int:
        """About what the entry of a picture takes on disk."""

    @abstractmethod
    def text_bytes(self, text: str) -> int:
        """At most about what the entry of a text takes on disk."""


class SDXLEncoder(FrozenEncoder):
    """Latents, the mode of the VAE's posterior, and both encoders' view of a prompt. `drops`: whether some prompts are
    left out in training, for which a model may ask for the empty prompt."""

    text_noun = "prompt"

    def __init__(self, config: Config, family: SDXL) -> None:
        self.unet = family.unet
        self.drops = config.drops_prompts()

    def picture(self, pixels: Tensor) -> Encoded:
        return {"latents": self.unet.encode_images(pixels)[0]}

    def text(self, text: str) -> Encoded:
        found = self.unet.encode_prompts([text])
        return {"prompt_embeds": found.prompt_embeds[0], "pooled": found.pooled[0]}

    def texts(self, prompts: Sequence[str]) -> list[str]:
        needs_empty = self.drops and not self.unet.force_zeros_for_empty_prompt
        return list(dict.fromkeys([*prompts, *([""] if needs_empty else [])]))

    def fingerprint(self, kind: Kind) -> str:
        unet = self.unet
        if kind == "image":
            return weights_fingerprint([unet.vae], "posterior mode", *_settings(unet.vae))
        encoders = [unet.text_encoder, unet.text_encoder_2]
        tokenizers = [_clip_tokenizer(tokenizer) for tokenizer in (unet.tokenizer, unet.tokenizer_2)]
        return weights_fingerprint(encoders, *_settings(*encoders), *tokenizers)

    def sleepers(self, *, pictures: bool) -> list[nn.Module]:
        unet = self.unet
        return unet.frozen() if pictures else [unet.text_encoder, unet.text_encoder_2]

    def picture_bytes(self, height: int, width: int) -> int:
        channels, rows, columns = self.unet.latent_shape(height, width)
        return HEADER_BYTES + 4 * channels * rows * columns

    def text_bytes(self, text: str) -> int:
        first, second = self.unet.text_encoder.config, self.unet.text_encoder_2.config
        width, size = first.hidden_size + second.hidden_size, next(self.unet.text_encoder.parameters()).element_size()
        return HEADER_BYTES + size * (self.unet.tokenizer.model_max_length * width + second.projection_dim)


class GLMEncoder(FrozenEncoder):
    """A picture's own tokens, of every grid that the AR half writes, and its latents where the DiT half sees any; the
    quoted words of a prompt as the DiT half reads them.

    The tokens of a picture that is edited are those of the one grid of image-to-image. `glyphs` are encoded by content,
    so two prompts that quote the same words share them.
    """

    text_noun = "quoted text"

    def __init__(self, config: Config, family: GLMImage) -> None:
        self.family = family
        self.mode = config.training.mode
        self.trains_ar, self.trains_dit = "ar" in config.parts(), "dit" in config.parts()
        self.draws = config.draws_in_steps()
        self.latents = self.trains_dit or self.draws

    def picture(self, pixels: Tensor) -> Encoded:
        ar, dit = self.family.ar, self.family.dit
        grids = ar.grids(pixels.shape[-2], pixels.shape[-1], self.mode)
        encoded = {"tokens": torch.cat([ar.tokenize_images(pixels, grid) for grid in grids], dim=1)[0]}
        if self.latents:
            encoded["latents"] = dit.encode_images(pixels)[0]
        return encoded

    def text(self, text: str) -> Encoded:
        dit = self.family.dit
        device = dit.text_encoder.get_input_embeddings().weight.device
        return {"glyph": encode_spans(json.loads(text), dit.text_encoder, dit.tokenizer, device)}

    def texts(self, prompts: Sequence[str]) -> list[str]:
        if not self.latents:
            return []
        return list(dict.fromkeys(spelled(glyph_texts(prompt)) for prompt in [*prompts, ""]))

    def serve(self, found: Callable[[str], Encoded]) -> None:
        self.family.dit.glyphs.made = lambda spans: found(spelled(spans))["glyph"]

    def fingerprint(self, kind: Kind) -> str:
        model, dit = self.family.ar.model.model, self.family.dit
        if kind == "text":
            words = [type(dit.tokenizer).__name__, len(dit.tokenizer), dit.tokenizer.pad_token_id, MAX_SPAN_TOKENS]
            return weights_fingerprint([dit.text_encoder], *_settings(dit.text_encoder), words)
        modules: list[nn.Module] = [model.visual, model.vqmodel]
        processor = self.family.ar.processor.image_processor.to_json_string()
        facts: list[Any] = [processor, self.mode, self.latents, *_settings(model.visual, model.vqmodel)]
        if self.latents:
            modules.append(dit.vae)
            facts += _settings(dit.vae)
        return weights_fingerprint(modules, *facts)

    def sleepers(self, *, pictures: bool) -> list[nn.Module]:
        """A half that is neither trained nor drawn with sleeps whole; what decodes the drawn pictures stays."""
        ar, dit = self.family.ar, self.family.dit
        words: list[nn.Module] = [dit.text_encoder]
        if not pictures:
            return words
        looks: list[nn.Module] = [ar.model.model.visual, ar.model.model.vqmodel]
        if self.draws:
            return [*looks, *words]
        return [*(looks if self.trains_ar else [ar]), *([dit.vae, *words] if self.trains_dit else [dit])]

    def picture_bytes(self, height: int, width: int) -> int:
        tokens = sum(rows * columns for rows, columns in self.family.ar.grids(height, width, self.mode))
        channels, rows, columns = self.family.dit.latent_shape(height, width)
        return HEADER_BYTES + 8 * tokens + (4 * channels * rows * columns if self.latents else 0)

    def text_bytes(self, text: str) -> int:
        weight = self.family.dit.text_encoder.get_input_embeddings().weight
        return HEADER_BYTES + glyph_token_bound(json.loads(text)) * weight.shape[1] * weight.element_size()


def spelled(spans: Sequence[str]) -> str:
    """Quoted words as the text that stands for them in a cache."""
    return json.dumps(list(spans), ensure_ascii=False)


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


def _clip_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Vocabulary, merges, normalisation and lengths."""
    assert isinstance(tokenizer, CLIPTokenizer)  # SDXL has no other
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in told.items() if name not in ("padding", "truncation")}  # of the last call
    return [type(tokenizer).__name__, model, tokenizer.model_max_length, tokenizer.pad_token]
