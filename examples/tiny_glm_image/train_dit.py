"""Stage 3: the DiT and the glyph encoder learn to paint under real tokens and quoted words; one step in five edits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import GlmImagePipeline
from torch import Tensor
from train_vq import LARGE, encode
from world import SIZE

from data import caption, chances, edits, instruction, pictures
from glm_training.algorithms.flow_matching import interpolate, velocity_target
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.glyph import glyph_texts

GRID = (LARGE, LARGE)
SIGN_SHARE = 0.5
"""Of the t2i rows: the tokens tell shapes and colours, and nothing of a word's letters."""
DROP = 0.1
"""Share of rows trained without condition, for classifier-free guidance."""


def train_dit(
    pipeline: GlmImagePipeline,
    *,
    steps: int,
    seed: int,
    log,
    checkpoint: Callable[[], None],
    mistakes: bool = False,
    batch_size: int = 64,
) -> None:
    """Trains the transformer and the glyph encoder in place; with `mistakes`, under captions many of which are wrong.
    `checkpoint` is called every 200 steps with the averaged weights in place."""
    dit = DiTComponent(
        pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler
    )
    model = pipeline.vision_language_encoder
    shown, edited = pictures(8000, seed + 4), edits(3000, seed + 5)
    with torch.no_grad():
        latents = torch.cat([dit.encode_images(c.float() / 255) for c in shown.images.split(64)])
        tokens = encode(model, shown.images, LARGE)
        edit_latents = torch.cat([dit.encode_images(c.float() / 255) for c in edited.targets.split(64)])
        edit_tokens, source_tokens = encode(model, edited.targets, LARGE), encode(model, edited.sources, LARGE)
        rng = np.random.default_rng((seed, 2))
        text = [caption(s, rng) if mistakes else s.prompt() for s in shown.scenes]
        edit_text = [instruction(e, rng) if mistakes else e.instruction for e in edited.edits]
    share = chances(shown.scenes, {"sign": SIGN_SHARE})
    log("dit latents ready")
    dit.text_encoder.requires_grad_(True)
    parameters = [*dit.transformer.parameters(), *dit.text_encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    started = time.time()
    for step in range(steps):
        if step % 5 == 4:
            rows = torch.randint(len(edit_tokens), (batch_size // 2,), generator=generator)
            prompts, clean = [edit_text[i] for i in rows], edit_latents[rows]
            sources = edited.sources[rows].float() / 255
            condition = dit.condition(prompts, edit_tokens[rows], GRID, sources, source_tokens[rows])
        else:
            rows = torch.multinomial(share, batch_size, replacement=True, generator=generator)
            prompts, clean = [text[i] for i in rows], latents[rows]
            condition = dit.condition(prompts, tokens[rows], GRID)
        loss = _loss(dit, prompts, clean, condition, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(0.005, 1 / (step + 1)))
        if step % 50 == 0 or step == steps - 1:
            log(f"dit step {step} loss {loss:.4f} {time.time() - started:.0f}s")
        if step % 200 == 199 or step == steps - 1:
            _with_average(parameters, average, checkpoint if step < steps - 1 else None)
    dit.eval()


def _loss(
    dit: DiTComponent, prompts: Sequence[str], clean: Tensor, condition: DiTCondition, generator: torch.Generator
) -> Tensor:
    """Flow matching of `clean` [B, C, h, w], a share of the rows without their condition."""
    drop = torch.rand(len(prompts), generator=generator) < DROP
    glyph, mask = spelled(dit, ["" if gone else prompt for gone, prompt in zip(drop, prompts, strict=True)])
    condition = replace(dit.drop_condition(condition, drop), glyph=glyph, glyph_mask=mask)
    # High noise, where colours and letters are decided, gets the most training.
    u = torch.sigmoid(0.9 + 1.3 * torch.randn(len(prompts), generator=generator))
    timestep, sigma = dit.training_sigmas(u, SIZE, SIZE)
    noise = torch.randn(clean.shape, generator=generator)
    velocity = dit(interpolate(clean, noise, sigma), timestep, condition)
    return (velocity - velocity_target(clean, noise)).pow(2).mean()


def spelled(dit: DiTComponent, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [B,G,D] of each prompt's one word, or of "", and their mask: as `dit.condition`, with gradient."""
    texts = [glyph_texts(prompt)[0] for prompt in prompts]
    rows = dit.tokenizer(texts, padding=True, return_tensors="pt")
    hidden = dit.text_encoder(rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    return hidden, rows.attention_mask.bool()


@torch.no_grad()
def _with_average(
    parameters: list[torch.nn.Parameter], average: list[torch.Tensor], checkpoint: Callable[[], None] | None
) -> None:
    """Puts the averaged weights in place; for good when there is nothing to call."""
    kept = [p.detach().clone() for p in parameters]
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.copy_(mean)
    if checkpoint is None:
        return
    checkpoint()
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
