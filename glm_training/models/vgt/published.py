"""Weights from elsewhere: the published VGT autoencoders, and the models that training one starts from.

The authors' files hold one state dict, in which queries, keys and values are one matrix, as in the first InternViT;
files of their training runs hold the teacher too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from glm_training.models.loading import load_errors_explained
from glm_training.models.vgt.autoencoder import DECODER_KEYS, Autoencoder, AutoencoderConfig, Teacher
from glm_training.models.vgt.tower import TOWERS
from glm_training.models.weights import read_weights

_TOLD = 5
"""How many names of weights a message lists."""

INTERNVIT_300M: dict[str, Any] = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, attention_bias=True,
    image_size=[448, 448], patch_size=[14, 14], layer_norm_eps=1e-6, norm_type="layer_norm", hidden_act="gelu",
)  # fmt: skip
"""The vision transformer of InternVL3-1B and 2B (vision_config of OpenGVLab/InternVL3-1B)."""

_QWEN2_5: dict[str, Any] = dict(
    model_type="qwen2", num_key_value_heads=2, vocab_size=151674, max_position_embeddings=32768, rope_theta=1e6,
    rms_norm_eps=1e-6, tie_word_embeddings=True,
)  # fmt: skip
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "OpenGVLab/InternVL3-1B": _QWEN2_5
    | dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864),
    "OpenGVLab/InternVL3-2B": _QWEN2_5
    | dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960),
}
"""Of the models that the published generators are made of: Qwen2.5's 0.5B and 1.5B, with InternVL's vocabulary."""

DC_AE_SANA: dict[str, Any] = dict(
    attention_head_dim=32, decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024], decoder_layers_per_block=[3] * 6,
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]], decoder_norm_types="rms_norm", decoder_act_fns="silu",
    decoder_in_shortcut=True, decoder_conv_act_fn="relu", upsample_block_type="interpolate",
)  # fmt: skip
"""The decoder of mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers, as diffusers' conversion script sets it; the defaults of
`AutoencoderDC` are another model."""

_BLOCK = {
    "attn.proj": "attention.projection_layer", "attn.q_norm": "attention.q_norm", "attn.k_norm": "attention.k_norm",
    "ls1": "lambda_1", "ls2": "lambda_2", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_EMBEDDINGS = {
    "class_embedding": "cls_token", "position_embedding": "position_embeddings",
    "patch_embedding": "patch_embeddings.projection",
}  # fmt: skip
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def published_config(*, channel_norm: bool = True, kl: bool = False) -> AutoencoderConfig:
    """Of `vgt_ae_internvl3.pth` (stage 2, with the norm) and of the stage 1 before it (without)."""
    return AutoencoderConfig(
        tower="internvl", tower_config=INTERNVIT_300M, hidden_size=896, decoder=DC_AE_SANA, image_size=448,
        channel_norm=channel_norm, kl=kl,
    )  # fmt: skip


def check_published(path: Path) -> None:
    """Whether a file is in the authors' layout, by the names in it. Raises ValueError."""
    names = sorted(read_weights(path))
    lacking = [p for p in ("encoder.", "down_mlp.", "decoder.") if not any(name.startswith(p) for name in names)]
    if lacking:
        raise ValueError(
            f"it has no weights called {', '.join(f'{part}*' for part in lacking)}, but {', '.join(names[:_TOLD])}: "
            "name vgt_ae_internvl3.pth (hf download hustvl/vgt_ae), or a checkpoint of an autoencoder's training"
        )


@torch.no_grad()
def load_published(autoencoder: Autoencoder, path: Path, *, teacher: Teacher | None = None) -> None:
    """Set all weights of `autoencoder`, and of `teacher` if one is given, from a file in the authors' layout.

    Raises FileNotFoundError, or ValueError that names weights which are unknown, missing or of another size, and for a
    teacher that the file does not hold.
    """
    saved = read_weights(path)
    renamed = _renamer(autoencoder.config.tower)
    own: dict[str, Tensor] = {}
    teachers: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        if name.startswith(("teacher.", "teacher_mlp1.")):
            student = name.replace("teacher.", "encoder.", 1).replace("teacher_mlp1.", "mlp1.", 1)
            teachers |= {new.removeprefix("tower."): value for new, value in renamed(student, tensor).items()}
        else:
            own |= renamed(name, tensor)
    _require_fit(own, autoencoder.state_dict(), f"the weights in {path} do not fit the autoencoder")
    if teacher is not None:
        if not teachers:
            raise ValueError(
                f"{path} holds no teacher: it is not of a training run. Make the teacher from the vision-language model"
            )
        _require_fit(teachers, teacher.tower.state_dict(), f"the teacher in {path} does not fit the tower")
        teacher.tower.load_state_dict(teachers)
    autoencoder.load_state_dict(own)


def autoencoder_from_parts(
    vision_language: str | Path, dc_ae: str | Path, *, channel_norm: bool, kl: bool = False, seed: int = 0
) -> Autoencoder:
    """What stage 1 starts from: the tower of a vision-language model (InternVL or Qwen2.5-VL, in transformers' format),
    the decoder of a DC-AE (diffusers'), and new layers between them that depend on `seed` alone; fp32.

    Raises ModelLoadError for folders that cannot be loaded or hold something else.
    """
    with load_errors_explained(f"the vision-language model in {vision_language}"):
        kind = AutoConfig.from_pretrained(vision_language).model_type
        if kind not in TOWERS:
            raise ValueError(f"it must be one of {', '.join(TOWERS)}, and is a {kind}")
        # the language half is read and dropped: what a checkpoint calls its weights is the library's to know
        whole, told = AutoModelForImageTextToText.from_pretrained(
            vision_language, dtype="auto", output_loading_info=True
        )
        _require_all(told["missing_keys"], ("vision_tower.", "multi_modal_projector.", "visual."))
    model = whole.model
    if kind == "internvl":
        parts, image_size = {"encoder": model.vision_tower, "projector": model.multi_modal_projector}, None
    else:
        parts, image_size = {"encoder": model.visual}, 448
    with load_errors_explained(f"the DC-AE in {dc_ae}"):
        stock, told = AutoencoderDC.from_pretrained(dc_ae, output_loading_info=True)
        _require_all(told["missing_keys"], ("decoder.",))
    vision = parts["encoder"].config
    own = vision.to_dict().items()
    values = dict(
        tower=kind,
        tower_config={name: value for name, value in own if name in type(vision).__annotations__},
        hidden_size=model.config.text_config.hidden_size,
        decoder={key: stock.config[key] for key in DECODER_KEYS},
        image_size=image_size or vision.image_size[0],
        channel_norm=channel_norm,
        latent_channels=stock.config.latent_channels,
        kl=kl,
    )
    # as JSON has them, so that the config is the same once it has been saved
    autoencoder = Autoencoder(AutoencoderConfig.from_dict(json.loads(json.dumps(values))), seed=seed)
    for name, part in parts.items():
        autoencoder.tower.get_submodule(name).load_state_dict(part.state_dict())
    autoencoder.decoder.load_state_dict(stock.decoder.state_dict())
    return autoencoder


def _require_all(missing: Iterable[str], parts: tuple[str, ...]) -> None:
    """The libraries draw at random what a file lacks, and say so in a warning."""
    lost = sorted(name for name in missing if any(part in name for part in parts))
    if lost:
        raise ValueError(f"{len(lost)} of its weights are missing, first {lost[0]}")


def _renamer(tower: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """Turns a weight of the authors' layout into those of ours; names it does not know stay as they are."""
    return _from_internvl if tower == "internvl" else _from_qwen


def _from_internvl(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if found := re.fullmatch(r"encoder\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)", name):
        attention = f"tower.encoder.encoder.layer.{found[1]}.attention"
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{attention}.{letter}_proj.{found[2]}": third for letter, third in thirds}
    block = r"(\d+\.)(attn\.\w+|ls\d|norm\d|mlp\.\w+)(.*)"
    for pattern, prefix, names in (
        (r"encoder\.encoder\.layers\." + block, "tower.encoder.encoder.layer.", _BLOCK),
        (r"encoder\.embeddings\.()(\w+)(.*)", "tower.encoder.embeddings.", _EMBEDDINGS),
        (r"mlp1\.()(\d)(.*)", "tower.projector.", _PROJECTOR),
    ):
        if (found := re.fullmatch(pattern, name)) and found[2] in names:
            return {f"{prefix}{found[1]}{names[found[2]]}{found[3]}": tensor}
    return {name: tensor}


def _from_qwen(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`visual` has its names of old, fused matrices included."""
    return {f"tower.{name}" if name.startswith("encoder.") else name: tensor}


def _require_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], complaint: str) -> None:
    shared = found.keys() & wanted.keys()
    problems = {
        "unknown": sorted(found.keys() - wanted.keys()),
        "missing": sorted(wanted.keys() - found.keys()),
        "of another size": sorted(name for name in shared if found[name].shape != wanted[name].shape),
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:_TOLD])}{', …' if len(names) > _TOLD else ''})"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(f"{complaint}: {'; '.join(told)}")
