"""What memory is counted by: parameters of a model by part, trained and frozen, with the shapes that an update rule
keeps its moments for; and phases of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from glm_training.engine.optimizers import is_hidden_matrix
from glm_training.models.lora import reached_layers
from glm_training.planning.models import Networks
from glm_training.planning.passes import ARSizes, DiTSizes, Resnet, Transformer, UNetSizes
from glm_training.planning.run import BF16_MOMENTS, GUIDANCE, Half, Run

Shapes = dict[str, tuple[int, ...]]
Items = dict[str, float]
"""Bytes by what they are."""

EIGHT_BIT_FROM = 4096
"""bitsandbytes keeps the moments of smaller tensors in fp32."""

EIGHT_BIT_BLOCK = 256
"""Moments of 8 bits share an fp32 scale by so many."""

METRIC_PARAMETERS = {
    "aesthetic": 427_616_513,
    "lpips": 2_470_848,
    "clip_score": 427_616_513,
    "pick_score": 986_109_441,
    "hps_v2": 986_109_441,
}
"""Of the networks that metrics load as they come, in fp32: CLIP ViT-L/14, AlexNet's features, CLIP ViT-H/14. The others
have none, or read on the CPU, or on another machine."""

TAKEN_WHOLE = ("adamw", "adamw_schedule_free")
"""Update rules whose step takes all tensors at once."""


@dataclass(frozen=True)
class Part:
    """A part of the model. total: parameters of its network, adapters left out. trained: by name. wrapped: weights
    of linear layers in its blocks, which quantization reaches. frozen: those that stay as they are, the network's own
    included under adapters. unit: of its largest sharding unit. rest: in no sharding unit. sleeps: whether it waits on
    the CPU while steps run. saved: whether a pipeline holds it."""

    name: str
    total: int
    trained: Shapes
    frozen: int
    wrapped: int
    unit: int
    rest: int = 0
    sleeps: bool = False
    saved: bool = True

    @property
    def trained_count(self) -> int:
        """Parameters under training."""
        return sizes_of(self.trained)

    @property
    def count(self) -> int:
        """Parameters of the part, its adapters among them."""
        return self.frozen + self.trained_count


@dataclass(frozen=True)
class Phase:
    """A phase of the run and what lies on a GPU at its peak, by what it is. parts: names of those whose weights do so;
    moments: of those whose moments do."""

    name: str
    items: Items
    parts: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.items.values())


def count_parts(networks: Networks, run: Run) -> list[Part]:
    """Every part: those that can be trained first, then what surrounds them."""
    halves = {half.name: half for half in run.halves}
    parts = networks.parts
    if run.family == "sdxl":
        units = ("BasicTransformerBlock", "ResnetBlock2D")
        trained = _trainables("unet", parts["unet"], halves, units)
        asleep = {"vae": run.keeps_pictures, "text_encoder": run.caches, "text_encoder_2": run.caches}
        return [*trained, *(_frozen(name, parts[name], sleeps) for name, sleeps in asleep.items())]
    vle = parts["vision_language_encoder"]
    looks = {"visual", "vqmodel"}
    draws, supervised = run.method == "reward", run.method in ("supervised", "preference")
    ar = _trainable("ar", vle, halves.get("ar"), ("GlmImageTextDecoderLayer",), without=looks)
    dit, *guidance = _trainables("dit", parts["transformer"], halves, ("GlmImageTransformerBlock",))
    if run.keeps_pictures and supervised:  # a half that neither learns nor draws sleeps whole
        ar = ar if "ar" in halves else _asleep(ar)
        dit = dit if "dit" in halves else _asleep(dit)
    model: Any = vle.get_submodule("model")
    seeing = _size(model.visual) + _size(model.vqmodel)
    return [
        ar,
        dit,
        *guidance,
        Part("vision tower and VQ model", seeing, {}, seeing, 0, 0, sleeps=run.keeps_pictures),
        _frozen("vae", parts["vae"], run.keeps_pictures and not draws),
        _frozen("text_encoder", parts["text_encoder"], run.caches),
    ]


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _frozen(name: str, module: nn.Module, asleep: bool) -> Part:
    return Part(name, _size(module), {}, _size(module), 0, 0, sleeps=asleep)


def _asleep(part: Part) -> Part:
    return replace(part, sleeps=True)


def _trainable(
    name: str, module: nn.Module, half: Half | None, units: Sequence[str], without: set[str] | None = None
) -> Part:
    skipped = without or set()
    own = {key: tuple(param.shape) for key, param in module.named_parameters() if skipped.isdisjoint(key.split("."))}
    total = sizes_of(own)
    blocks = [child for child in module.modules() if type(child).__name__ in units]
    linear = {id(child): child for block in blocks for child in block.modules() if isinstance(child, nn.Linear)}
    wrapped = sum(child.weight.numel() for child in linear.values())
    unit = max(map(_size, blocks), default=0)
    rest = total - sum(map(_size, blocks))
    if half is None:
        return Part(name, total, {}, total, wrapped, unit, rest)
    if not half.lora.enabled:
        return Part(name, total, own, 0, 0, unit, rest)
    return Part(name, total, adapters(module, half.lora.targets, half.lora.rank), total, wrapped, unit, rest)


def _trainables(name: str, module: nn.Module, halves: Mapping[str, Half], units: Sequence[str]) -> list[Part]:
    """A diffusion half, and beside it the guidance network that learns from what it draws, where there is one."""
    found = [_trainable(name, module, halves.get(name), units)]
    if GUIDANCE in halves:
        found.append(replace(_trainable(GUIDANCE, module, halves[GUIDANCE], units), saved=False))
    return found


def sizes_of(shapes: Shapes) -> int:
    """Numbers in all of them."""
    return sum(map(math.prod, shapes.values()))


def adapters(module: nn.Module, targets: Sequence[str], rank: int) -> Shapes:
    """Shapes of the adapters that `add_lora` puts on a network: A [rank, in] and B [out, rank] of each layer."""
    shapes: Shapes = {}
    for key in sorted(reached_layers(module, targets)):
        layer = module.get_submodule(key)
        if isinstance(layer, nn.Linear):
            shapes[f"{key}.lora_A.weight"] = (rank, layer.in_features)
            shapes[f"{key}.lora_B.weight"] = (layer.out_features, rank)
    return shapes


def teacher_bytes(run: Run, part: Part) -> float:
    """What teachers of on-policy distillation keep of the weights of a trained part, to stand in for them: all of them,
    in fp32, of a part that is trained whole. Under adapters, of a teacher that is a model at most all that lies below
    them, and of one of adapters the layers that those reach, taken for the layers of the student's."""
    half = next(half for half in run.halves if half.name == part.name)
    if not half.lora.enabled:
        return 4.0 * part.trained_count * len(run.teachers)
    layers = (key.removesuffix(".lora_A.weight") for key in part.trained if key.endswith(".lora_A.weight"))
    reached = sum(part.trained[f"{key}.lora_A.weight"][1] * part.trained[f"{key}.lora_B.weight"][0] for key in layers)
    return float(run.dtype * sum(part.total if kind == "model" else reached for kind in run.teachers))


# -- moments -----------------------------------------------------------------------------------------------------------


def moment_bytes(rule: str, trained: Shapes) -> float:
    """Bytes that an update rule keeps from step to step; the count of steps of each tensor is left out."""
    each = _MOMENTS[rule]
    return sum(each(name, shape) for name, shape in trained.items())


def step_bytes(rule: str, trained: Shapes) -> float:
    """Bytes that a step needs besides, on a GPU. torch's AdamW takes the root of all second moments at once (its
    foreach implementation, which it chooses there); rules that go tensor by tensor need a few of the largest."""
    count, largest = (f(map(math.prod, trained.values())) for f in (sum, max)) if trained else (0, 0)
    if rule in TAKEN_WHOLE:
        return 4.0 * count
    # in bf16: both moments in fp32, the noise by which one is rounded, its bits, and what they come to
    return {"adamw_8bit": 0.0, "sgd": 0.0, BF16_MOMENTS: 18.0}.get(rule, 12.0) * largest


def _fp32(tensors: int) -> Callable[[str, tuple[int, ...]], float]:
    return lambda name, shape: 4.0 * tensors * math.prod(shape)


def _eight_bit(name: str, shape: tuple[int, ...]) -> float:
    count = math.prod(shape)
    if count < EIGHT_BIT_FROM:
        return 8.0 * count
    return 2 * (count + 4.0 * math.ceil(count / EIGHT_BIT_BLOCK))


def _factored(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return 4.0 * math.prod(shape)
    return 4.0 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _muon(name: str, shape: tuple[int, ...]) -> float:
    matrix = is_hidden_matrix(name, nn.Parameter(torch.empty(shape, device="meta")))
    return (4.0 if matrix else 8.0) * math.prod(shape)


_MOMENTS: Mapping[str, Callable[[str, tuple[int, ...]], float]] = {
    "adamw": _fp32(2),
    BF16_MOMENTS: lambda name, shape: 4.0 * math.prod(shape),
    "adamw_8bit": _eight_bit,
    "adafactor": _factored,
    "prodigy": _fp32(4),  # two moments, the start, and the weighted sum of gradients
    "lion": _fp32(1),
    "muon": _muon,
    "adamw_schedule_free": _fp32(2),
    "sgd": _fp32(1),
}


# -- sizes of passes ---------------------------------------------------------------------------------------------------


def dit_sizes(network: nn.Module) -> DiTSizes:
    """Of GLM-Image's transformer."""
    config: Any = network.config
    blocks: Any = network.get_submodule("transformer_blocks")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inner = blocks[0].ff.net[2].in_features
    return DiTSizes(len(blocks), width, inner / width, _size(blocks[0]), _widest(network), _size(network))


def ar_sizes(network: nn.Module) -> ARSizes:
    """Of the language model of GLM-Image's AR half."""
    model: Any = network
    language = model.model.language_model
    text = language.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cast = sum(_size(layer) for layer in language.layers) + _size(model.lm_head)
    return ARSizes(
        layers=len(language.layers),
        width=text.hidden_size,
        ratio=text.intermediate_size / text.hidden_size,
        keys=text.num_key_value_heads * head,
        vocabulary=text.vocab_size,
        codes=text.vision_vocab_size,
        codebook=model.model.vqmodel.config.num_embeddings,
        block=_size(language.layers[0]),
        widest=_widest(language.layers[0]),
        weights=cast,
    )


def unet_sizes(network: nn.Module) -> UNetSizes:
    """Of SDXL's UNet."""
    unet: Any = network
    resnets: list[Resnet] = []
    transformers: list[Transformer] = []
    levels = len(unet.down_blocks)
    stages = [(block, 2**index, False) for index, block in enumerate(unet.down_blocks)]
    stages.append((unet.mid_block, 2 ** (levels - 1), False))
    stages += [(block, 2 ** (levels - 1 - index), True) for index, block in enumerate(unet.up_blocks)]
    text = 0
    for block, scale, joined in stages:
        resnets += [Resnet(each.in_channels, each.out_channels, scale, joined) for each in block.resnets]
        for stack in getattr(block, "attentions", []):
            inner = stack.transformer_blocks
            transformers.append(Transformer(inner[0].norm1.normalized_shape[0], len(inner), scale))
            text += sum(_size(each.attn2.to_k) + _size(each.attn2.to_v) for each in inner)
    return UNetSizes(resnets, transformers, _widest(network), _size(network), text)


def _widest(network: nn.Module) -> int:
    """Weights of the largest layer that multiplies."""
    layers = [child for child in network.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    return max(layer.weight.numel() for layer in layers)
