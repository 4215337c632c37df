"""Stage 2: the AR model learns to write the tokens of pictures it is told (t2i: preview and large grid; i2i: large)."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import GlmImagePipeline
from torch import Tensor
from train_vq import LARGE, PREVIEW, encode
from world import SIZE

from data import caption, chances, edits, instruction, pictures
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.ar_types import ARPrompt

LARGE_WEIGHT, EDIT_WEIGHT = 6.0, 24.0
"""Loss weights of a large-grid token, and of one of an edit, against a preview token: there are 16, 16 and 256."""

SHARES = {"sign": 0.12, "relation": 0.68}
"""Of the pictures drawn: a plan says nothing of a word; which colour goes with which shape takes longest."""


def train_ar(
    pipeline: GlmImagePipeline, *, steps: int, seed: int, log, mistakes: bool = False, batch_size: int = 32
) -> None:
    """Trains the language model in place on teacher-forced tokens, the end token included; with `mistakes`, under
    captions many of which are wrong, so that it knows the world and is seldom asked for what it shows."""
    model = pipeline.vision_language_encoder
    component = ARComponent(model, pipeline.processor)
    shown, edited = pictures(12000, seed + 2), edits(8000, seed + 3)
    with torch.no_grad():
        tokens = torch.cat([encode(model, shown.images, PREVIEW), encode(model, shown.images, LARGE)], dim=1)
        edit_targets = encode(model, edited.targets, LARGE)
        sources = edited.sources.float() / 255
        rng = np.random.default_rng((seed, 2))
        text = [caption(s, rng) if mistakes else s.prompt() for s in shown.scenes]
        edit_text = [instruction(e, rng) if mistakes else e.instruction for e in edited.edits]
        prompts = component.encode_prompts(text, SIZE, SIZE)
        edit_prompts = component.encode_prompts(edit_text, SIZE, SIZE, sources)
    log(f"ar tokens ready, {tokens.unique().numel()} codes in use")
    model.requires_grad_(False)
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    t2i_chances = chances(shown.scenes, SHARES)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    started = time.time()
    for step in range(steps):
        rows = torch.multinomial(t2i_chances, batch_size, replacement=True, generator=generator)
        edit_rows = torch.randint(len(edit_targets), (2 * batch_size,), generator=generator)
        t2i = token_losses(model, prompts.select(rows), tokens[rows])
        i2i = token_losses(model, edit_prompts.select(edit_rows), edit_targets[edit_rows])
        preview, large, edit = t2i[:, : PREVIEW**2].mean(), t2i[:, PREVIEW**2 :].mean(), i2i.mean()
        loss = preview + (LARGE / PREVIEW) ** 2 * (LARGE_WEIGHT * large + EDIT_WEIGHT * edit)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"ar step {step} preview {preview:.3f} large {large:.3f} edit {edit:.3f} {time.time() - started:.0f}s")
    model.eval()


def token_losses(model, prompt: ARPrompt, tokens: Tensor) -> Tensor:
    """Cross-entropies [B, T+1] over the whole vision vocabulary, so that the stock `generate` stops where it should."""
    end = torch.full((len(tokens), 1), model.config.image_end_token_id)
    hidden = model.model.language_model(
        input_ids=torch.cat([prompt.input_ids, tokens], dim=1),
        attention_mask=torch.cat([prompt.attention_mask, torch.ones_like(tokens)], dim=1),
        position_ids=torch.cat([prompt.position_ids, prompt.decode_position_ids], dim=2),
        use_cache=False,
    ).last_hidden_state[:, prompt.input_ids.shape[1] - 1 :]
    labels = torch.cat([tokens, end], dim=1)
    return F.cross_entropy(model.lm_head(hidden).float().transpose(1, 2), labels, reduction="none")
