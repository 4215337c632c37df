"""What a pass through a network keeps and needs at most, in bytes: formulas per block of the stock modules.

A block keeps for its backward pass the tensors that are listed with its formula. With gradient checkpointing it keeps
its input alone, and one block at a time is computed again with all of its tensors. The counts were read from the stock
blocks, and `benchmarks/plan_peaks.py` compares the sums with peaks that it measures.

Letters: B rows, S tokens (image and text), D width, r the width of the feed-forward over D, C channels, n places of a
feature map. `low` and `wide` bytes of a number in the autocast type and in fp32; without autocast both are the
network's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CODES_AT_ONCE = 2**24
"""Logits that the AR half scores together, `models.glm_image.ar.LOGITS_PER_CHUNK`."""

WIDE = 4


@dataclass(frozen=True)
class Precision:
    """How a pass computes. `amp`: under autocast. `low`: bytes of a hidden number. `whole`: all weights are trained, in
    fp32, which autocast casts; else adapters are, beside frozen weights."""

    low: int
    amp: bool
    whole: bool


@dataclass(frozen=True)
class Pass:
    """Bytes of a training pass. kept: at the end of the forward pass, for the backward. forward: at most in the
    forward pass, with `casts` of the weights that live until its end and are not among what is kept. backward: at most
    in the backward pass, without the gradients that stay."""

    kept: float
    forward: float
    backward: float
    casts: float = 0.0

    @property
    def peak(self) -> float:
        """At most in either."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class DiTSizes:
    """GLM-Image's transformer: `layers` blocks of width D, the feed-forward `ratio` times as wide; `block` weights of a
    block, `widest` of its largest layer, `weights` of all."""

    layers: int
    width: int
    ratio: float
    block: int
    widest: int
    weights: int


@dataclass(frozen=True)
class ARSizes:
    """The language model: `layers` of width D, the feed-forward `ratio` times as wide, keys of all heads `keys` wide;
    `vocabulary` rows of the embedding; it scores `codes`, of which `codebook` are of images. Weights as in
    `DiTSizes`."""

    layers: int
    width: int
    ratio: float
    keys: int
    vocabulary: int
    codes: int
    codebook: int
    block: int
    widest: int
    weights: int


@dataclass(frozen=True)
class Resnet:
    """A residual block: channels in and out, at 1 / `scale` of the latents' side; `joined`: it takes a skip."""

    inputs: int
    outputs: int
    scale: int
    joined: bool


@dataclass(frozen=True)
class Transformer:
    """`depth` transformer blocks of `channels` at 1 / `scale` of the latents' side."""

    channels: int
    depth: int
    scale: int


@dataclass(frozen=True)
class UNetSizes:
    """SDXL's UNet; weights as in `DiTSizes`. text_weights: keys and values of the texts, whose inputs need no gradient:
    no cast of those is kept for the backward pass."""

    resnets: Sequence[Resnet]
    transformers: Sequence[Transformer]
    widest: int
    weights: int
    text_weights: int


# -- GLM-Image's transformer -------------------------------------------------------------------------------------------


def dit_block(sizes: DiTSizes, at: Precision) -> float:
    """Bytes that a block keeps, per number of its input [B, S, D].

    Always: the feed-forward before and after its GELU (2 r), queries and keys as they are normalised (2), turned (2),
    values, the attention's output. Adapters: the input of each adapted projection as the adapter casts it (5 in
    all). Whole: the operands of the gates and shifts instead. Under autocast norms keep their inputs in fp32: adapters
    4 such tensors, whole 5.
    """
    if at.amp:
        return (2 * sizes.ratio + 9) * at.low + (5 if at.whole else 4) * WIDE
    return (2 * sizes.ratio + (14 if at.whole else 10)) * at.low


def dit_pass(sizes: DiTSizes, rows: int, tokens: int, at: Precision, *, checkpointing: bool) -> Pass:
    """A training pass over [rows, tokens, D]. Under autocast the casts of whole weights live through the forward pass;
    in the backward pass at most those of a block. Its temporaries: gradients of the feed-forward's hidden layer (of
    adapters too, through fp32), or, whole, the gradient of its largest layer before it is added."""
    numbers = rows * tokens * sizes.width
    block, ratio = dit_block(sizes, at) * numbers, sizes.ratio
    around = _around(at, amp=6 * at.low + WIDE, plain=6 * WIDE) * numbers
    if at.whole:
        passing = ratio * at.low * numbers + (at.low * at.amp + WIDE) * sizes.widest
    elif at.amp:
        passing = (ratio * (2 * at.low + WIDE) + 2 * at.low) * numbers
    else:
        passing = (2 * ratio - 1) * at.low * numbers
    stack = Stack(sizes.layers, numbers, block, dit_running(sizes, at) * numbers, passing, sizes.block, sizes.weights)
    return _stacked(stack, at, around, checkpointing)


def guided(found: Pass) -> Pass:
    """Two such passes, without condition and with it, whose tensors are kept together."""
    return Pass(2 * found.kept, found.forward + found.kept, found.backward + found.kept)


def dit_running(sizes: DiTSizes, at: Precision) -> float:
    """Bytes that a block needs at most in a forward pass besides what it keeps, per number of its input: in the
    feed-forward, of adapters base, adapter and scaled adapter (3 r)."""
    if at.whole:
        return 2 * sizes.ratio * at.low + (WIDE + at.low if at.amp else 3 * at.low)
    return 3 * sizes.ratio * at.low + (4 * WIDE + 2 * at.low if at.amp else 5 * at.low)


def dit_inference(sizes: DiTSizes, rows: int, tokens: int, at: Precision, *, adapters: bool) -> float:
    """Bytes of a pass without gradient, at most: in the feed-forward, before and after its GELU (2 r) or, with
    adapters, base, adapter and scaled adapter (3 r), beside the states around it, of which autocast has norms and sums
    in fp32."""
    if adapters:
        each = 3 * sizes.ratio * at.low + (4 * WIDE + 4 * at.low if at.amp else 6 * at.low)
    else:
        each = 2 * sizes.ratio * at.low + (3 * WIDE + at.low if at.amp else 6 * at.low)
    return each * rows * tokens * sizes.width + _casts(at, sizes.weights)


# -- GLM-Image's language model ----------------------------------------------------------------------------------------


def ar_layer(sizes: ARSizes, at: Precision) -> float:
    """Bytes that a layer keeps, per number of its input [B, S, D].

    Always: the feed-forward's gate and rise (2 r), the gate after its SiLU and their product (2 r), turned queries and
    the attention's output. The four RMS norms compute in fp32 and keep their input (adapters 4, whole 6 such tensors);
    the rest are inputs of projections. Keys and values are narrow.
    """
    narrow = 4 * sizes.keys / sizes.width
    if at.amp:
        return (4 * sizes.ratio + (9 if at.whole else 7) + narrow) * at.low + (6 if at.whole else 4) * WIDE
    return (4 * sizes.ratio + (13 if at.whole else 9) + narrow) * at.low


def ar_pass(sizes: ARSizes, rows: int, tokens: int, written: int, at: Precision, *, checkpointing: bool) -> Pass:
    """A training pass over [rows, tokens, D] that scores the last `written` tokens, `CODES_AT_ONCE` logits at a time.
    Whole, the backward pass ends with the
    gradient of the embedding, in fp32 over the whole vocabulary."""
    numbers = rows * tokens * sizes.width
    layer, ratio = ar_layer(sizes, at) * numbers, sizes.ratio
    around = _around(at, amp=at.low + WIDE, plain=2 * WIDE) * numbers
    if at.whole:
        passing = 2 * ratio * at.low * numbers + (at.low * at.amp + WIDE) * sizes.widest
    elif at.amp:
        passing = (ratio * (2 * at.low + WIDE) - WIDE) * numbers
        around = 2 * at.low * rows * written * sizes.width
    else:
        passing = (2 * ratio - 3) * at.low * numbers
        around = 2 * at.low * rows * written * sizes.width
    stack = Stack(sizes.layers, numbers, layer, ar_running(sizes, at) * numbers, passing, sizes.block, sizes.weights)
    found = _stacked(stack, at, around, checkpointing)
    scoring = ar_scoring(sizes, rows, written, at)
    last = WIDE * sizes.vocabulary * sizes.width if at.whole else 0
    scored = found.kept + scoring  # when all layers are through, and before the first is met again
    return Pass(found.kept, max(found.forward, scored + found.casts), max(found.backward, scored, last), found.casts)


def ar_scoring(sizes: ARSizes, rows: int, written: int, at: Precision) -> float:
    """Bytes of scoring a chunk of tokens, at most in its backward pass: the support (a byte each), and in fp32 the
    log-probs, their gradient and that of what was masked; under autocast also the logits as they come, and in fp32."""
    each = 3 * WIDE + 1 + (at.low + WIDE if at.amp else 0)
    return each * min(CODES_AT_ONCE, rows * written * sizes.codes)


def ar_running(sizes: ARSizes, at: Precision) -> float:
    """Bytes that a layer needs at most in a forward pass besides what it keeps, per number of its input: in the
    feed-forward, of adapters base, adapter and scaled adapter of gate and rise (6 r)."""
    if at.whole:
        return 4 * sizes.ratio * at.low + (WIDE + at.low if at.amp else 3 * at.low)
    return 6 * sizes.ratio * at.low + 4 * (WIDE if at.amp else at.low)


def ar_inference(sizes: ARSizes, rows: int, tokens: int, at: Precision, *, adapters: bool) -> float:
    """Bytes of reading [rows, tokens, D] without gradient, at most: in the feed-forward, gate and rise, the gate after
    its SiLU and their product (4 r) or, with adapters, base, adapter and scaled adapter of gate and rise (6 r)."""
    around = (3 if adapters else 2) * WIDE if at.amp else 4 * at.low
    each = (6 if adapters else 4) * sizes.ratio * at.low + around
    return each * rows * tokens * sizes.width + _casts(at, sizes.weights)


def kv_cache(sizes: ARSizes, rows: int, tokens: int, low: int) -> float:
    """Keys and values [rows, kv heads, tokens, head] of all layers."""
    return 2 * sizes.layers * sizes.keys * rows * tokens * low


# -- SDXL's UNet -------------------------------------------------------------------------------------------------------


def resnet_keeps(block: Resnet, at: Precision) -> float:
    """Bytes that a residual block keeps per place: inputs and outputs of its two group norms (fp32 under autocast);
    whole, the inputs of its convolutions; where a skip joins, the joined input."""
    both = block.inputs + block.outputs
    wide = WIDE if at.amp else at.low
    return 2 * both * wide + (both * at.low if at.whole else 0) + (block.inputs * at.low if block.joined else 0)


def transformer_keeps(at: Precision) -> float:
    """Bytes that a transformer block keeps per number of its input: GEGLU's input (8), gate and product (4, whole 8),
    queries and attention's outputs of both attentions, inputs of adapted projections or of all, and three norms."""
    wide = WIDE if at.amp else 2 * at.low if at.whole else at.low
    return (27 if at.whole else 24) * at.low + 3 * wide


def unet_pass(sizes: UNetSizes, rows: int, places: int, at: Precision, *, checkpointing: bool) -> Pass:
    """A training pass over latents of so many `places`. Checkpointed are residual and transformer blocks; around those
    the group norm and the projections of each stack of transformer blocks stay."""
    wide = WIDE if at.amp else at.low
    numbers = [rows * places // each.scale**2 for each in sizes.transformers]
    stacks = [n * each.channels * (wide + 2 * at.low) for n, each in zip(numbers, sizes.transformers, strict=True)]
    places_of = [rows * places // each.scale**2 for each in sizes.resnets]
    resnets = [n * resnet_keeps(each, at) for n, each in zip(places_of, sizes.resnets, strict=True)]
    inputs = sum(n * each.inputs * at.low for n, each in zip(places_of, sizes.resnets, strict=True))
    blocks = [n * each.channels * transformer_keeps(at) for n, each in zip(numbers, sizes.transformers, strict=True)]
    entries = [n * each.channels * each.depth * at.low for n, each in zip(numbers, sizes.transformers, strict=True)]
    casts = _casts(at, sizes.weights)
    temporary: float = (at.low * at.amp + WIDE) * sizes.widest if at.whole else 0
    if checkpointing:
        kept = inputs + sum(entries) + sum(stacks)
        again = max([*resnets, *blocks], default=0.0)
        return Pass(kept, kept + casts + max(resnets, default=0.0), kept + again + temporary)
    every = sum(block * each.depth for block, each in zip(blocks, sizes.transformers, strict=True))
    all_kept = sum(resnets) + every + sum(stacks)
    held = all_kept + _casts(at, sizes.weights - sizes.text_weights)
    return Pass(held, all_kept + casts, held + temporary)


def unet_inference(sizes: UNetSizes, rows: int, places: int, at: Precision) -> float:
    """Bytes of a pass without gradient, at most: the skips, and the largest block."""
    skips = sum(rows * places // each.scale**2 * each.outputs * at.low for each in sizes.resnets if not each.joined)
    without = replace(at, whole=False)  # nothing is kept for gradients of weights
    largest = max(rows * places // each.scale**2 * resnet_keeps(each, without) for each in sizes.resnets)
    return skips + largest + _casts(at, sizes.weights)


# -- the VAE -----------------------------------------------------------------------------------------------------------


def vae_decoding(channels: Sequence[int], rows: int, pixels: int, size: int) -> float:
    """Bytes of decoding `rows` pictures, at most: the last block's first residual block holds its input, the norm of it
    and that after its SiLU, [rows, channels[1], H, W] each; and the picture in fp32."""
    return (3 * channels[min(1, len(channels) - 1)] * size + 3 * WIDE) * rows * pixels


# -- shared ------------------------------------------------------------------------------------------------------------


def _casts(at: Precision, weights: int) -> float:
    """Autocast keeps the casts of fp32 weights until it is left; frozen ones are in its type already."""
    return at.low * weights if at.amp and at.whole else 0.0


def _around(at: Precision, *, amp: float, plain: float) -> float:
    """Bytes per number that lie around the blocks where their weights are trained too."""
    if not at.whole:
        return 0.0
    return amp if at.amp else plain


@dataclass(frozen=True)
class Stack:
    """Equal blocks in a row: `numbers` in the input of each, bytes that one `keeps`, that it needs besides while
    `running` forward and while `passing` backward; weights of one and of all."""

    layers: int
    numbers: float
    keeps: float
    running: float
    passing: float
    block_weights: int
    weights: int


def _stacked(stack: Stack, at: Precision, around: float, checkpointing: bool) -> Pass:
    casts = _casts(at, stack.weights)
    if checkpointing:
        kept = stack.layers * at.low * stack.numbers + around
        again = kept + stack.keeps + stack.passing + _casts(at, stack.block_weights)
        return Pass(kept, kept + casts + stack.running, again, casts)
    kept = stack.layers * stack.keeps + around + casts
    # the block that runs has kept none of what it needs yet
    return Pass(kept, kept - stack.keeps + max(stack.keeps, stack.running), kept + stack.passing)
