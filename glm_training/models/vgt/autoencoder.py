"""VGT's autoencoder: a vision-language model's own features, narrowed to a few channels and drawn back to pixels.

B images of H x W px in [0, 1], latents of C channels on a grid of h x w places (h = H / stride), L = h * w, D the width
of the tower's features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import Decoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights

from glm_training.algorithms.flow_tokens import channel_norm
from glm_training.models.library_versions import recompute_layers
from glm_training.models.loading import ModelLoadError, load_errors_explained, read_typed_config
from glm_training.models.vgt.tower import TOWERS, InternVLTower, Qwen25VLTower
from glm_training.models.weights import cast_weights, frozen_copy, load_weights
from glm_training.utils.tensor_file import write_tensor_file

CONFIG_FILE, WEIGHTS_FILE, TEACHER_FILE = "config.json", "model.safetensors", "teacher.safetensors"

DECODER_KEYS = {
    "attention_head_dim": "attention_head_dim",
    "decoder_block_types": "block_type",
    "decoder_block_out_channels": "block_out_channels",
    "decoder_layers_per_block": "layers_per_block",
    "decoder_qkv_multiscales": "qkv_multiscales",
    "decoder_norm_types": "norm_type",
    "decoder_act_fns": "act_fn",
    "decoder_in_shortcut": "in_shortcut",
    "decoder_conv_act_fn": "conv_act_fn",
    "upsample_block_type": "upsample_block_type",
}
"""What a decoder is made of: keys of diffusers' `AutoencoderDC` config, and the arguments of its decoder."""

LOG_VARIANCES = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an autoencoder is made of.

    Attributes:
        tower: "internvl" or "qwen2_5_vl".
        tower_config: keyword arguments of the tower's Hugging Face vision config.
        hidden_size: D, the width of the features.
        decoder: the keys of `AutoencoderDC`'s config that its decoder is built from, all of `DECODER_KEYS`.
        image_size: side of the square pictures it is trained on, in px.
        channel_norm: whether latents are normed over their channels (stage 2, the published weights) or not (stage 1).
        latent_channels: C.
        bottleneck_blocks: residual blocks between the features and the latents.
        kl: whether the latents are drawn from a learnt Gaussian; no published configuration does so.
    """

    tower: str
    tower_config: dict[str, Any]
    hidden_size: int
    decoder: dict[str, Any]
    image_size: int
    channel_norm: bool
    latent_channels: int = 32
    bottleneck_blocks: int = 3
    kl: bool = False

    @property
    def stride(self) -> int:
        """Pixels along a side of what one place of the latents stands for."""
        patch = self.tower_config.get("patch_size", 14)
        merged = self.tower_config.get("spatial_merge_size", 2)
        return int(merged * (patch if isinstance(patch, int) else patch[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives the config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the autoencoder's config") -> Self:
        """Raises ValueError that names every key that is missing, unknown or of a wrong type; `where` it stands."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kinds: dict[str, type] = {"str": str, "int": int, "bool": bool, "dict[str, Any]": dict}
        problems = []
        if "channel_norm" not in values:
            problems.append(
                "it does not say whether the latents are normed over their channels: add "
                '"channel_norm": true for weights of stage 2 and the published ones, false for weights of stage 1'
            )
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        problems += [f"{name} is missing" for name in sorted(required - values.keys() - {"channel_norm"})]
        problems += [f"{name} is no key of it" for name in sorted(values.keys() - fields.keys())]
        for name in sorted(fields.keys() & values.keys()):
            kind, value = kinds[str(fields[name].type)], values[name]
            if type(value) is not kind:
                problems.append(f"{name} must be of type {kind.__name__}, got {value!r}")
            elif type(value) is int and value < (0 if name == "bottleneck_blocks" else 1):
                problems.append(f"{name} is too small: {value}")
            elif name == "tower" and value not in TOWERS:
                problems.append(f"tower must be one of {', '.join(TOWERS)}, got {value!r}")
            elif name == "decoder" and isinstance(value, dict):
                problems += [f"decoder.{key} is missing" for key in DECODER_KEYS if key not in value]
                unknown = sorted(value.keys() - DECODER_KEYS)
                problems += [f"decoder.{key} is no key of AutoencoderDC's decoder" for key in unknown]
        if problems:
            raise ValueError(f"{where} cannot be used: {'; '.join(problems)}")
        return cls(**values)


@dataclass(frozen=True)
class Posterior:
    """A Gaussian for each number of the latents: `mean` (normed where the autoencoder norms) and `log_variance`, fp32
    [B, C, h, w], the latter within `LOG_VARIANCES`."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """`images` fp32 [B, 3, H, W], around [0, 1] and not clamped; `latents` fp32 [B, C, h, w] before any noise;
    `features` [B, L, D], which distillation compares with the teacher's; `posterior` of a KL autoencoder, else None."""

    images: Tensor
    latents: Tensor
    features: Tensor
    posterior: Posterior | None


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)), all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Autoencoder(nn.Module):
    """Tower, residual bottleneck, decoder of a DC-AE. Random weights depend on `seed` alone.

    `forward` is the atomic unit of its training. Latents and images are fp32 under autocast and in half precision too.
    """

    sharding_units: ClassVar[tuple[str, ...]] = (
        "InternVLVisionLayer", "Qwen2_5_VLVisionBlock", "ResidualBlock", "ResBlock", "EfficientViTBlock",
    )  # fmt: skip

    def __init__(self, config: AutoencoderConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.latent_channels * (2 if config.kl else 1)
        with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
            torch.default_generator.manual_seed(seed)
            self.tower = TOWERS[config.tower](config.tower_config, width)
            self.down_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.bottleneck_blocks))
            self.down_mlp = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels)
            )
            for part in (self.down_blocks, self.down_mlp):
                part.apply(_initialise)
            self.decoder = _build_decoder(config)
        if config.image_size % self.tower.stride:
            raise ValueError(
                f"image_size {config.image_size} is no multiple of the {self.tower.stride} px that the tower makes one "
                "place of the latents of"
            )

    @property
    def stride(self) -> int:
        """Pixels along a side of what one place of the latents stands for: 28 in the published models."""
        return self.tower.stride

    def cast(self, dtype: torch.dtype) -> Self:
        """Its weights in `dtype`. Unlike `to`, which would round the colours' mean and deviation and rotary
        frequencies, so that the same picture is another one in half precision."""
        return cast_weights(self, dtype)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each layer of the tower and of the decoder in the backward pass. Acts in training mode only."""
        recompute_layers(self.tower.encoder)
        for level in self.decoder.up_blocks:
            for layer in level:
                if "forward" not in vars(layer):
                    layer.forward = _recomputed(layer)

    def features(self, images: Tensor) -> Tensor:
        """[B, L, D] of images [B, 3, H, W] in [0, 1]; ValueError for sides that are no multiples of the stride."""
        return self.tower(images)

    def encode(self, images: Tensor) -> Tensor:
        """Latents fp32 [B, C, h, w] of images [B, 3, H, W] in [0, 1], without noise: a KL autoencoder's means."""
        latents, _ = self._latents(self.features(images), self.tower.grid(images))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images fp32 [B, 3, stride * h, stride * w] of latents [B, C, h, w], around [0, 1], not clamped."""
        drawn = self.decoder(latents.to(self.decoder.conv_in.weight.dtype)).float()
        size = [self.stride * side for side in latents.shape[-2:]]
        return (F.interpolate(drawn, size=size, mode="bilinear", align_corners=False) + 1) / 2

    def forward(
        self, images: Tensor, latent_noise: Tensor | None = None, posterior_noise: Tensor | None = None
    ) -> Reconstruction:
        """The reconstruction of images [B, 3, H, W] in [0, 1].

        latent_noise: [B, C, h, w], added to the latents before they are decoded; the caller scales it (alpha ~ U[0, .1]
        per image in stage 2). posterior_noise: standard normal [B, C, h, w], for a KL autoencoder; without it the means
        are decoded. Nothing else is random, in training mode either. ValueError for posterior_noise without a
        posterior.
        """
        features = self.features(images)
        latents, posterior = self._latents(features, self.tower.grid(images))
        if posterior_noise is not None:
            if posterior is None:
                raise ValueError(
                    "posterior_noise is for an autoencoder with kl: this one has no posterior to draw from"
                )
            latents = posterior.mean + (posterior.log_variance / 2).exp() * posterior_noise
        seen = latents if latent_noise is None else latents + latent_noise
        return Reconstruction(self.decode(seen), latents, features, posterior)

    def _latents(self, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Posterior | None]:
        for block in self.down_blocks:
            features = block(features)
        latents = self.down_mlp(features).float().transpose(1, 2).unflatten(2, grid)
        log_variance = None
        if self.config.kl:
            latents, log_variance = latents.chunk(2, dim=1)
        if self.config.channel_norm:
            latents = channel_norm(latents)
        return latents, None if log_variance is None else Posterior(latents, log_variance.clamp(*LOG_VARIANCES))

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """ "encoder" and "rest", parameters by their names in this module. The published runs train the encoder, which
        knows pictures already, at half the rate of the rest; the projector belongs to the rest."""
        named = dict(self.named_parameters())
        encoder = {name: param for name, param in named.items() if name.startswith("tower.encoder.")}
        return {"encoder": encoder, "rest": {name: named[name] for name in named if name not in encoder}}

    def save_pretrained(self, folder: str | Path, *, teacher: Teacher | None = None) -> None:
        """Write config.json and model.safetensors, and the `teacher` beside them, which a later stage distils from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_type": "vgt_autoencoder", **self.config.to_dict()}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_tensor_file(folder / WEIGHTS_FILE, self.state_dict(), {"format": "pt"})
        if teacher is not None:
            write_tensor_file(folder / TEACHER_FILE, teacher.tower.state_dict(), {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """What `save_pretrained` wrote, in evaluation mode. Raises ModelLoadError for a folder that holds no
        autoencoder or not all of it."""
        config = read_config(folder)
        with load_errors_explained(f"the VGT autoencoder in {folder}"):
            with no_init_weights():
                autoencoder = cls(config).cast(dtype)
            load_weights(autoencoder, Path(folder) / WEIGHTS_FILE)
        return autoencoder.eval()


class Teacher(nn.Module):
    """A frozen copy of a tower: what the autoencoder's features are kept close to. Always in evaluation mode."""

    def __init__(self, tower: InternVLTower | Qwen25VLTower, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tower = frozen_copy(tower, dtype).eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, L, D] of images [B, 3, H, W] in [0, 1], without gradient."""
        return self.tower(images)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """The teacher that `Autoencoder.save_pretrained` left in `folder`. Raises ModelLoadError, which says where else
        a teacher comes from if there is none."""
        config = read_config(folder)
        path = Path(folder) / TEACHER_FILE
        if not path.is_file():
            raise ModelLoadError(
                f"there is no {TEACHER_FILE} in {folder}: the autoencoder there has moved away from the "
                "vision-language model it started from, so make the teacher from that model"
            )
        with load_errors_explained(f"the teacher in {folder}"):
            with torch.random.fork_rng(devices=[]), no_init_weights():
                tower = TOWERS[config.tower](config.tower_config, config.hidden_size)
            load_weights(tower, path)
        return cls(tower, dtype)


def read_config(folder: str | Path) -> AutoencoderConfig:
    """The config of an autoencoder's folder. Raises ModelLoadError without one or for one that is wrong."""
    return read_typed_config(folder, CONFIG_FILE, "vgt_autoencoder", "VGT autoencoder", AutoencoderConfig.from_dict)


def _recomputed(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = layer.forward
    return lambda x: checkpoint(forward, x, use_reentrant=False) if layer.training else forward(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _build_decoder(config: AutoencoderConfig) -> Decoder:
    options = {DECODER_KEYS[key]: value for key, value in config.decoder.items()}
    channels = options["block_out_channels"]
    # each shortcut repeats its channels a whole number of times; diffusers would fail at the first picture only
    if options["in_shortcut"] and channels[-1] % config.latent_channels:
        raise ValueError(
            f"decoder_block_out_channels must end in a multiple of latent_channels {config.latent_channels}, "
            f"got {channels}"
        )
    if any(4 * outer % inner for outer, inner in pairwise(channels)):
        raise ValueError(
            f"four times each of decoder_block_out_channels must be a multiple of the next one, got {channels}"
        )
    return Decoder(in_channels=3, latent_channels=config.latent_channels, **options)
