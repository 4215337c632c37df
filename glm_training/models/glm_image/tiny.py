"""A complete GLM-Image of a few MB: the same classes, files and code path as `zai-org/GLM-Image`.

`build_tiny` makes it in memory with random weights (`model.name: tiny-random`). The trained one (`model.name: tiny`)
has the same architecture and is made by `examples/tiny_glm_image/train.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TINY_FOLDER = Path(__file__).with_name("tiny")
"""Where the trained tiny model lies in the package."""


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny GLM-Image. The defaults are those of the trained model.

    `reserved`: ids between the codebook and the text vocabulary: start and end of image, the rest unused (128 in
    GLM-Image). `marks`: tokens with an id of their own; those without one follow the text.
    """

    codebook: int = 512
    reserved: int = 32
    marks: tuple[tuple[str, int], ...] = ()
    ar_hidden: int = 128
    ar_layers: int = 4
    vision_hidden: int = 64
    vision_layers: int = 2
    dit_heads: int = 6
    dit_layers: int = 5
    glyph_hidden: int = 64
    vae_channels: tuple[int, ...] = (8, 16, 48, 64)
    latent_channels: int = 8


RANDOM_SHAPE = TinyShape(
    codebook=64,
    ar_hidden=64,
    ar_layers=2,
    vision_hidden=32,
    dit_heads=2,
    dit_layers=2,
    glyph_hidden=32,
    vae_channels=(8, 8, 16, 16),
    latent_channels=4,
)
"""Smaller still, for tests."""


def build_tiny(shape: TinyShape = RANDOM_SHAPE, *, seed: int = 0, corpus: list[str] | None = None) -> GlmImagePipeline:
    """A GLM-Image pipeline with random fp32 weights that depend on `seed` alone.

    `corpus` are texts from which the AR tokenizer learns its merges; without it every byte is a token.
    """
    processor = tiny_processor(shape, corpus)
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
        torch.default_generator.manual_seed(seed)
        ar = GlmImageForConditionalGeneration(tiny_ar_config(tokenizer, shape))
        ar.generation_config = tiny_generation_config(tokenizer, shape)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=384, d_model=shape.glyph_hidden, d_kv=16, d_ff=shape.glyph_hidden * 2, num_layers=2,
                num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0, dtype="float32",
            )
        )  # fmt: skip
        transformer = GlmImageTransformer2DModel(
            patch_size=2, in_channels=shape.latent_channels, out_channels=shape.latent_channels,
            num_layers=shape.dit_layers, attention_head_dim=32, num_attention_heads=shape.dit_heads,
            text_embed_dim=shape.glyph_hidden, time_embed_dim=128, condition_dim=32,
            prior_vq_quantizer_codebook_size=shape.codebook,
        )  # fmt: skip
        blocks = len(shape.vae_channels)
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=shape.vae_channels, layers_per_block=1,
            latent_channels=shape.latent_channels, norm_num_groups=2, sample_size=128, scaling_factor=1.0,
            mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
            latents_mean=[0.0] * shape.latent_channels, latents_std=[1.0] * shape.latent_channels,
        )  # fmt: skip
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(), processor=processor, text_encoder=text_encoder,
        vision_language_encoder=ar, vae=vae, transformer=transformer, scheduler=glm_scheduler(),
    )  # fmt: skip
    modules: list[Any] = [ar, text_encoder, vae, transformer]
    for module in modules:
        module.eval()
    return pipeline


def glm_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """GLM-Image's."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256
    )


def tiny_processor(shape: TinyShape = RANDOM_SHAPE, corpus: list[str] | None = None) -> GlmImageProcessor:
    """The AR half's: its tokenizer, and what makes patches of pictures."""
    image_processor = GlmImageImageProcessor(
        patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=32 * 32, max_pixels=2048 * 2048
    )
    start, end = f"<|dit_token_{shape.codebook}|>", f"<|dit_token_{shape.codebook + 1}|>"
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{start}<|image|>{end}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer = tiny_ar_tokenizer(shape, corpus)
    return GlmImageProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


def tiny_generation_config(tokenizer: PreTrainedTokenizerBase, shape: TinyShape = RANDOM_SHAPE) -> GenerationConfig:
    """How the stock pipeline draws tokens: none of the reserved ids."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        top_k=0,
        suppress_tokens=list(range(shape.codebook, shape.codebook + shape.reserved)),
        eos_token_id=shape.codebook + 1,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_ar_config(tokenizer: PreTrainedTokenizerBase, shape: TinyShape = RANDOM_SHAPE) -> GlmImageConfig:
    """The AR half's configuration."""
    head_dim = 32
    text = dict(
        vocab_size=len(tokenizer), hidden_size=shape.ar_hidden, intermediate_size=shape.ar_hidden * 2,
        num_hidden_layers=shape.ar_layers, num_attention_heads=shape.ar_hidden // head_dim, num_key_value_heads=1,
        max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id,
        vision_vocab_size=shape.codebook + shape.reserved, eos_token_id=shape.codebook + 1, dtype="float32",
        # Frequencies dealt to time, row and column in turn: each axis of a small grid needs its share of fast ones.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * 16},
    )  # fmt: skip
    vision = dict(
        depth=shape.vision_layers, hidden_size=shape.vision_hidden, num_heads=2, image_size=256, patch_size=16,
        intermediate_size=shape.vision_hidden * 2, dtype="float32",
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    assert isinstance(image_token, int)
    vq = dict(embed_dim=16, num_embeddings=shape.codebook, latent_channels=shape.vision_hidden, dtype="float32")
    return GlmImageConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=image_token,
        image_start_token_id=shape.codebook, image_end_token_id=shape.codebook + 1, dtype="float32",
    )  # fmt: skip


def tiny_ar_tokenizer(shape: TinyShape = RANDOM_SHAPE, corpus: list[str] | None = None) -> PreTrainedTokenizerBase:
    """Byte-level BPE whose first ids are the image codes, as in GLM-Image (text ids come after them)."""
    codebook = shape.codebook
    vision = [f"<|dit_token_{i}|>" for i in range(codebook + shape.reserved)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    if corpus:
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = _pre_tokenizer()
        learner.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
        )
        merges = _read_merges(learner)
    tokens = [*vision, *alphabet, *dict.fromkeys(left + right for left, right in merges)]
    ids = {token: i for i, token in enumerate(tokens)} | dict(shape.marks)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    special = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token=vision[codebook], eos_token=vision[codebook + 1],
        extra_special_tokens=special, padding_side="left",
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": vision}, replace_extra_special_tokens=False)
    return fast


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _read_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
