"""A complete SDXL of about 1.5 million random weights, built offline from the classes of the real one."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_LENGTH = 77
HIDDEN = 32
"""Width of each text encoder; the UNet attends to both side by side."""

_WORDS = ("a", "red", "blue", "green", "circle", "square", "left", "right", "of", "the", "sign", "cat", "photo")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tiny(*, seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """A stock SDXL pipeline with random fp32 weights that depend on `seed` alone; 8 px per latent, 4 channels.

    `prediction_type` is "epsilon", as SDXL's, or "v_prediction". The global generators are left as they were.
    """
    first, second = tiny_tokenizers()
    with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(first))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(second))
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
            cross_attention_dim=2 * HIDDEN, norm_num_groups=8, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4, sample_size=64, scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    modules: list[torch.nn.Module] = [text_encoder, text_encoder_2, unet, vae]
    for module in modules:
        module.requires_grad_(False).eval()
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=first, tokenizer_2=second,
        unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def build_tiny_taesd(*, seed: int = 0) -> AutoencoderTiny:
    """A TAESD for the latents of `build_tiny`, with random fp32 weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        taesd = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), latent_channels=4,
        )  # fmt: skip
    return taesd.requires_grad_(False).eval()


def tiny_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Those of `build_tiny`; SDXL's second tokenizer pads with "!"."""
    return _tokenizer(_END), _tokenizer("!")


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, projection_dim=HIDDEN,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip


def _tokenizer(pad: str) -> CLIPTokenizer:
    """Byte-level BPE that knows a few words whole and spells every other text in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens[pieces[0]] = None
    vocabulary = {token: i for i, token in enumerate([*tokens, _START, _END])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(merges), pad_token=pad, model_max_length=TEXT_LENGTH  # type: ignore[arg-type]
    )  # fmt: skip
