"""Stage 3: the DiT learns to paint under real prior tokens and quoted words; one step in five is an edit."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from diffusers import GlmImagePipeline
from train_vq import LARGE, encode
from world import SIZE

from data import edits, pictures
from glm_training.algorithms.flow_matching import interpolate, velocity_target
from glm_training.models.glm_image.dit import DiTComponent

GRID = (LARGE, LARGE)
SIGN_SHARE = 0.25
"""Of the t2i rows: words are slow to learn, and so are exact shapes and colours."""
DROP = 0.1
"""Share of rows trained without condition, for classifier-free guidance."""


def train_dit(
    pipeline: GlmImagePipeline, *, steps: int, seed: int, log, checkpoint: Callable[[], None], batch_size: int = 64
) -> None:
    """Trains the transformer in place; `checkpoint` is called every 200 steps with the averaged weights in place."""
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
        text, edit_text = [s.prompt() for s in shown.scenes], [e.instruction for e in edited.edits]
    share = shown.weights(SIGN_SHARE)
    log("dit latents ready")
    parameters = list(dit.transformer.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    started = time.time()
    for step in range(steps):
        if step % 5 == 4:
            rows = torch.randint(len(edit_tokens), (batch_size // 2,), generator=generator)
            condition = dit.condition(
                [edit_text[i] for i in rows], edit_tokens[rows], GRID, edited.sources[rows].float() / 255,
                source_tokens[rows],
            )  # fmt: skip
            clean = edit_latents[rows]
        else:
            rows = torch.multinomial(share, batch_size, replacement=True, generator=generator)
            condition, clean = dit.condition([text[i] for i in rows], tokens[rows], GRID), latents[rows]
        condition = dit.drop_condition(condition, torch.rand(len(rows), generator=generator) < DROP)
        # High noise, where colours and letters are decided, gets the most training.
        u = torch.sigmoid(0.9 + 1.3 * torch.randn(len(rows), generator=generator))
        timestep, sigma = dit.training_sigmas(u, SIZE, SIZE)
        noise = torch.randn(clean.shape, generator=generator)
        velocity = dit(interpolate(clean, noise, sigma), timestep, condition)
        loss = (velocity - velocity_target(clean, noise)).pow(2).mean()
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
