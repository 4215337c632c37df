"""GLM-Image's AR half as a trainable component: writes plans of image tokens, and scores given ones.

`ARComponent.forward` is the atomic unit: the log-probs of given tokens. `rollout` draws tokens with a loop of its own
over the same modules, positions and distribution: replaying a rollout before an update gives its log-probs again.
Letters in shapes: `ar_types`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

from glm_training.models.gathering import drawing, gathered
from glm_training.models.glm_image import vq
from glm_training.models.glm_image.ar_types import ARPrompt, ARRollout, EncodedSources, Grid, Sources
from glm_training.models.glm_image.decode import write_tokens
from glm_training.models.glm_image.decode_graph import Stepper
from glm_training.models.glm_image.positions import (
    Mode,
    decode_positions,
    generation_grids,
    image_grid,
    prompt_positions,
)
from glm_training.models.glm_image.prompt_text import PromptReader
from glm_training.models.glm_image.token_sampling import (
    TokenSampler,
    all_log_probs,
    chosen_log_probs,
    divergences,
    entropies,
)
from glm_training.models.library_versions import recompute_layers
from glm_training.models.prompt_reading import shortened

LOGITS_PER_CHUNK = 2**24
"""Logits held at once while scoring (64 MiB in fp32); longer inputs go in chunks that the backward pass recomputes."""


class ARComponent(nn.Module):
    """The AR half with its processor. Never touches the positions that the stock module caches on itself.

    Under FSDP2 this module is the root: `fully_shard` the `sharding_units` inside it, then the component.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    sharding_units: ClassVar[tuple[str, ...]] = ("GlmImageTextDecoderLayer",)

    def __init__(self, model: GlmImageForConditionalGeneration, processor: GlmImageProcessor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.stepper = Stepper()
        """How `rollout` takes its steps: as a CUDA graph where it can be one."""

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    @property
    def num_codes(self) -> int:
        """K: codes of the VQ codebook, ids [0, K) of the vocabulary."""
        return self.model.model.vqmodel.config.num_embeddings

    @staticmethod
    def grids(height: int, width: int, mode: Mode) -> tuple[Grid, ...]:
        """Token grids in writing order for images of `height` x `width` px: (preview, large) in t2i, (large,) in i2i.

        Raises `ValueError` unless both sides are positive multiples of 32.
        """
        return generation_grids(height, width, mode)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass. Acts in training mode (`train()`) only."""
        recompute_layers(self.model)

    def limit_stock_generation(self) -> None:
        """Lets the stock `generate` draw what `rollout` draws: codes alone, and all of them.

        Its own default keeps the 50 likeliest (`top_k`). And nothing that is learned from rollouts holds down the ids
        past the codebook, which are left out of their distribution (`suppress_tokens`, the end token included: the
        stock pipeline counts the tokens).
        """
        ids = range(self.num_codes, self.model.config.text_config.vision_vocab_size)
        config = self.model.generation_config
        config.top_k, config.suppress_tokens = 0, list(ids)

    def encode_prompts(
        self, prompts: Sequence[str], height: int, width: int, sources: Sources | None = None
    ) -> ARPrompt:
        """Prompts for images of `height` x `width` px, with the stock pipeline's own template and token ids.

        `sources` float [P, 3, h, w] in [0, 1], sides multiples of 32 px, makes it i2i with one source image each; those
        that are `EncodedSources` are not looked at again. The
        AR half sees a source at h/32 x w/32 tokens, the size at which the DiT sees it. The stock processor first
        enlarges sides below 512 px and shrinks those above 2048 px (and the stock DiT then fails on the mismatch);
        between these limits the two agree.

        Raises `ValueError` for sides that are not multiples of 32 px, a count of sources other than the count of
        prompts, no prompts, and prompts that are too long or spell the model's own image tokens.
        """
        mode: Mode = "t2i" if sources is None else "i2i"
        grids = self.grids(height, width, mode)
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a non-empty list of strings, got {prompts!r}")
        self._check_text(prompts, height, width, mode)
        source_tokens, source_grid = self._source_tokens(len(prompts), sources)
        inputs = self._template(prompts, height, width, source_grid)
        input_ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        if source_tokens is not None:
            placeholders = input_ids == self.model.config.image_token_id
            input_ids = input_ids.masked_scatter(placeholders, source_tokens)
        positions, start = prompt_positions(input_ids, mask, self.model.config.image_start_token_id, source_grid)
        return ARPrompt(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            decode_position_ids=decode_positions(start, grids),
            grids=grids,
            preview_length=sum(rows * columns for rows, columns in grids[:-1]),
            source_tokens=source_tokens,
            source_grid=source_grid,
        )

    def rollout(
        self,
        prompt: ARPrompt,
        group_size: int,
        uniforms: Tensor,
        *,
        temperature: float,
        top_p: float,
        do_sample: bool = True,
        micro_batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> ARRollout:
        """Writes `group_size` plans per prompt, without gradient and with dropout off.

        `uniforms` [B, T] in [0, 1), B = P * group_size prompt-major: row b, column t decides token t of sample b by
        inverting its cumulative distribution, so a sample does not depend on the batch it is drawn in. With `do_sample`
        False the most probable code is taken. At most `micro_batch_size` samples are written at once (None: all), which
        bounds the memory: a key/value cache of Lp + T places for each. `on_step(t)` is called before each token after
        the first of every such batch, and may raise to abandon the rollout.

        Raises `ValueError` for a wrong shape or a setting out of range, `FloatingPointError` for non-finite logits.
        """
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if not temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; for greedy decoding use do_sample=False"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        rows = len(prompt) * group_size
        if uniforms.shape != (rows, prompt.T):
            raise ValueError(
                f"uniforms must be [{rows}, {prompt.T}] ({len(prompt)} prompts x {group_size} samples x tokens); "
                f"got {list(uniforms.shape)}"
            )
        if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise ValueError("uniforms must lie in [0, 1)")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "do_sample": do_sample}
        written = []
        with drawing(self, self.model.model.language_model.layers) as turns:
            stepping = self.stepper.steps if turns is None else None  # no graph holds what processes exchange
            on_step = on_step if turns is None else turns.asking(on_step)
            for part, samples, draws in _batches(prompt, group_size, uniforms, micro_batch_size or rows):
                sampler = TokenSampler(draws.to(self.device), self.num_codes, **options)
                write_tokens(self.model, part, samples, sampler, on_step, stepping, turns)
                # here, outside inference mode, `result` makes tensors that a backward pass may keep
                written.append(sampler.result())
        tokens, log_probs, supports = zip(*written, strict=True)
        support = None if supports[0] is None else torch.cat(supports)
        drawn_for = prompt.repeat_interleave(group_size)
        return ARRollout(drawn_for, torch.cat(tokens), torch.cat(log_probs), support, temperature)

    def forward(
        self,
        prompt: ARPrompt,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        support: Tensor | None = None,
        entropy: bool = False,
        others: Tensor | None = None,
    ) -> Tensor:
        """The atomic unit: fp32 log-probs [B, T] of `tokens` [B, T] after `prompt` (B rows), with gradient.

        The distribution is the rollout's: over the codebook, divided by `temperature`, renormalised over `support`
        (uint8 [B, T, ceil(K/8)] from `ARRollout.support`, None for all codes). Pass both as the rollout holds them.
        LoRA dropout, if any, acts in training mode. With `entropy` the result is [2, B, T]: the log-probs, and the
        entropy of each token's distribution in nats. With `others` [B, T, K], what `distributions` gave for another
        model, it is [2, B, T] too: the log-probs, and the KL of each token's distribution to theirs in nats.
        """
        hidden, size, supports = self._read(prompt, tokens, temperature, support)
        score = self._score
        if size < prompt.T and torch.is_grad_enabled():
            score = self._recomputed_score
        theirs = [None] * len(supports) if others is None else others.split(size, dim=1)
        chunks = zip(hidden.split(size, dim=1), tokens.split(size, dim=1), supports, theirs, strict=True)
        return torch.cat([score(*chunk, temperature, entropy) for chunk in chunks], dim=-1)

    @torch.no_grad()
    def distributions(
        self, prompt: ARPrompt, tokens: Tensor, *, temperature: float = 1.0, support: Tensor | None = None
    ) -> Tensor:
        """fp32 log-probs [B, T, K] of every code at the place of each token of `tokens` [B, T], of the distributions
        that `forward` scores with; -inf outside the support."""
        found = []
        with gathered(self, without=self.model.model.language_model.layers):
            hidden, size, supports = self._read(prompt, tokens, temperature, support)
            for chunk, kept in zip(hidden.split(size, dim=1), supports, strict=True):
                logits = self.model.lm_head(chunk)[..., : self.num_codes]
                found.append(all_log_probs(logits, temperature=temperature, support=kept))
        return torch.cat(found, dim=1)

    def _read(
        self, prompt: ARPrompt, tokens: Tensor, temperature: float, support: Tensor | None
    ) -> tuple[Tensor, int, Sequence[Tensor | None]]:
        """Hidden states [B, T, D] that predict each token, how many tokens are scored at once, and the support of each
        such chunk."""
        self._check_replay(prompt, tokens, temperature, support)
        read = tokens[:, :-1]  # the last token is predicted, never read
        prompt, padded = prompt.trimmed()
        mask = torch.cat([prompt.attention_mask, torch.ones_like(read)], dim=1) if padded else None
        hidden = self.model.model.language_model(
            input_ids=torch.cat([prompt.input_ids, read], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([prompt.position_ids, prompt.decode_position_ids[:, :, :-1]], dim=2),
            use_cache=False,
        ).last_hidden_state[:, prompt.input_ids.shape[1] - 1 :]  # a token is predicted at the place before it
        size = max(1, LOGITS_PER_CHUNK // (len(tokens) * self.model.model.language_model.config.vision_vocab_size))
        supports = [None] * len(tokens[0].split(size)) if support is None else support.split(size, dim=1)
        return hidden, size, supports

    def tokenize_images(self, images: Tensor, grid: Grid) -> Tensor:
        """VQ ids [B, rows*columns] long, in raster order, of float images [B, 3, H, W] in [0, 1] resized to `grid`.

        Waits for no other process: each has its own pictures, and what looks at them is whole beside shards.
        """
        return vq.tokenize_images(self.model, self.processor.image_processor, images, grid)

    def code_vectors(self, tokens: Tensor) -> Tensor:
        """[..., C] vectors of the frozen codebook for `tokens` [...], on their device."""
        weight = self.model.model.vqmodel.quantize.embedding.weight
        return F.embedding(tokens.to(weight.device), weight).to(tokens.device)

    def targets(self, images: Tensor, prompt: ARPrompt) -> Tensor:
        """Tokens [B, T] long that real images [B, 3, H, W] in [0, 1] stand for: what supervised training predicts.

        Each grid of the prompt is the image itself at that grid's size, encoded; the preview is not made from the ids
        of the large grid.
        """
        if len(images) != len(prompt):
            raise ValueError(f"got {len(images)} images for {len(prompt)} prompts")
        return torch.cat([self.tokenize_images(images, grid) for grid in prompt.grids], dim=1)

    def _source_tokens(self, count: int, sources: Sources | None) -> tuple[Tensor | None, Grid | None]:
        if sources is None:
            return None, None
        if isinstance(sources, EncodedSources):
            if len(sources) != count:
                raise ValueError(f"sources must be one per prompt; got {len(sources)} for {count} prompts")
            return sources.tokens.to(self.device), sources.grid
        if sources.ndim != 4 or len(sources) != count:
            raise ValueError(f"sources must be [{count}, 3, h, w], one per prompt; got {list(sources.shape)}")
        grid = image_grid(sources.shape[-2], sources.shape[-1])
        return self.tokenize_images(sources, grid), grid

    def _template(self, prompts: Sequence[str], height: int, width: int, source_grid: Grid | None) -> Any:
        """The processor's output for a left-padded batch. Of sources it is told the size alone: their ids are put in
        afterwards."""
        images: list[list[dict[str, Any]]] = [[] for _ in prompts]
        if source_grid is not None:
            side = self.processor.image_processor.patch_size
            blank = torch.zeros(3, side * source_grid[0], side * source_grid[1], dtype=torch.uint8)
            images = [[{"type": "image", "image": blank}] for _ in prompts]
        conversations: list[Any] = [
            [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]
            for image, text in zip(images, prompts, strict=True)
        ]
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "target_h": height, "target_w": width}
        if source_grid is not None:
            options["do_resize"] = False
        return self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )

    def _check_text(self, prompts: Sequence[str], height: int, width: int, mode: Mode) -> None:
        """The context holds them beside the image, and the template alone writes the tokens that mark where images
        are."""
        reader = PromptReader(self.processor.tokenizer, self.model.config)
        for row, reading in enumerate(reader.read(prompts, height, width, mode)):
            if reading.fault is not None:
                reason, remedy = reading.fault
                raise ValueError(f"prompt {row} ({shortened(prompts[row])!r}): {reason}. {remedy}.")

    def _check_replay(self, prompt: ARPrompt, tokens: Tensor, temperature: float, support: Tensor | None) -> None:
        if tokens.shape != (len(prompt), prompt.T):
            raise ValueError(f"tokens must be [{len(prompt)}, {prompt.T}] for this prompt, got {list(tokens.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        packed = (*tokens.shape, -(-self.num_codes // 8))
        if support is not None and (support.shape != packed or support.dtype != torch.uint8):
            raise ValueError(f"support must be uint8 {list(packed)}, got {support.dtype} {list(support.shape)}")

    def _score(
        self,
        hidden: Tensor,
        tokens: Tensor,
        support: Tensor | None,
        others: Tensor | None,
        temperature: float,
        entropy: bool,
    ) -> Tensor:
        logits = self.model.lm_head(hidden)[..., : self.num_codes]
        log_probs = chosen_log_probs(logits, tokens, temperature=temperature, support=support)
        if others is not None:
            return torch.stack([log_probs, divergences(logits, others, temperature=temperature, support=support)])
        if not entropy:
            return log_probs
        return torch.stack([log_probs, entropies(logits, temperature=temperature, support=support)])

    def _recomputed_score(
        self,
        hidden: Tensor,
        tokens: Tensor,
        support: Tensor | None,
        others: Tensor | None,
        temperature: float,
        entropy: bool,
    ) -> Tensor:
        return checkpoint(self._score, hidden, tokens, support, others, temperature, entropy, use_reentrant=False)


def _batches(prompt: ARPrompt, group_size: int, uniforms: Tensor, limit: int) -> Iterator[tuple[ARPrompt, int, Tensor]]:
    """Whole groups while `limit` samples hold one, else parts of a group: (prompts, samples of each, their draws).

    The samples of a batch share the reading of their prompt, and the batches follow one another in row order.
    """
    places = torch.arange(len(prompt), device=prompt.input_ids.device)
    at_once = min(limit, group_size)
    for some in places.split(max(1, limit // group_size)):
        first = int(some[0]) * group_size
        part = prompt if len(some) == len(prompt) else prompt.select(some)
        for draws in uniforms[first : first + len(some) * group_size].split(len(some) * at_once):
            yield part, len(draws) // len(some), draws
