"""Stage 1b: the visual tokenizer. A ViT and a 16-dim bottleneck learn to carry each patch; k-means makes the codes.

It is taught the pictures as they are without the words on their signs: as in GLM-Image, whose codes are too coarse for
letters, what a word looks like reaches the DiT through the glyph encoder alone.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration

from data import Pictures, pictures

LARGE, PREVIEW = 4, 16
"""Grid sides at 128x128: the large grid sees the picture at 64 px, the preview at 256 px (16 px patches both)."""


def train_vq(model: GlmImageForConditionalGeneration, *, steps: int, seed: int, log) -> None:
    """Trains the vision tower and `quant_conv`, then fills the codebook by k-means over both grids' features."""
    shown = pictures(8000, seed + 1)
    images, wordless = shown.images, pictures(8000, seed + 1, words=False).images
    vq, visual = model.model.vqmodel, model.model.visual
    decoder = nn.Sequential(nn.Linear(vq.quantize.embedding_dim, 256), nn.GELU(), nn.Linear(256, 16 * 16 * 3))
    parameters = [*visual.parameters(), *vq.quant_conv.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    started = time.time()
    for step in range(steps):
        loss = torch.zeros(())
        for side, batch in ((LARGE, 48), (PREVIEW, 4)):
            rows = torch.randint(len(images), (batch,), generator=generator)
            patches = to_patches(images[rows], side)
            z = F.normalize(features(model, patches, side), dim=-1)
            # The same patches elsewhere in other pictures must look the same, or the codes would spell out positions.
            order = torch.randperm(len(patches), generator=generator)
            moved = F.normalize(features(model, patches[order], side), dim=-1)
            loss = loss + (z[order] - moved).pow(2).sum(-1).mean()
            z = F.normalize(z + 0.06 * torch.randn(z.shape, generator=generator), dim=-1)
            error = (decoder(z) - to_patches(wordless[rows], side)).pow(2).mean(-1)
            loss = loss + error.mean() + error.pow(2).mean().sqrt()  # rare patches count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"vq step {step} loss {loss:.4f} {time.time() - started:.0f}s")
    _fill_codebook(model, shown, generator)
    log(f"vq codebook filled {time.time() - started:.0f}s")


@torch.no_grad()
def _fill_codebook(model: GlmImageForConditionalGeneration, shown: Pictures, generator: torch.Generator) -> None:
    """k-means over the features of both grids; signs, which are all alike but for their colour, give few points."""
    quantize = model.model.vqmodel.quantize
    signs = torch.tensor([bool(scene.word) for scene in shown.scenes])
    some = torch.cat([shown.images[~signs][:3500], shown.images[signs][:500]])
    large = features(model, to_patches(some, LARGE), LARGE)
    some = torch.cat([shown.images[~signs][:300], shown.images[signs][:150]])
    preview = torch.cat([features(model, to_patches(c, PREVIEW), PREVIEW) for c in some.split(50)])
    kept = preview[torch.randperm(len(preview), generator=generator)[: len(large) // 2]]
    points = F.normalize(torch.cat([large, kept]), dim=-1)
    quantize.embedding.weight.copy_(_kmeans(points, quantize.num_embeddings, generator))


def to_patches(images: Tensor, side: int) -> Tensor:
    """uint8 [B,3,128,128] to CLIP-normalised patches [B*side*side, 3*16*16] of the picture at side*16 px."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    x = F.interpolate(images.float(), size=(side * 16, side * 16), mode="bicubic", antialias=True).clamp(0, 255) / 255
    x = (x - torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    x = x.unflatten(2, (side, 16)).unflatten(4, (side, 16)).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, 3 * 16 * 16)


def features(model: GlmImageForConditionalGeneration, patches: Tensor, side: int) -> Tensor:
    """Patches to unnormalised code features [B*side*side, embed_dim]."""
    grids = torch.tensor([[1, side, side]]).repeat(len(patches) // side**2, 1)
    hidden = model.model.visual(patches, grids).last_hidden_state
    conv = model.model.vqmodel.quant_conv
    return F.linear(hidden, conv.weight[:, :, 0, 0], conv.bias)


@torch.no_grad()
def encode(model: GlmImageForConditionalGeneration, images: Tensor, side: int) -> Tensor:
    """uint8 images to code ids [B, side*side]."""
    codes = F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1)
    ids = []
    for chunk in images.split(200 if side == LARGE else 25):
        z = F.normalize(features(model, to_patches(chunk, side), side), dim=-1)
        ids.append((z @ codes.T).argmax(-1).view(len(chunk), -1))
    return torch.cat(ids)


def _kmeans(points: Tensor, k: int, generator: torch.Generator, rounds: int = 25) -> Tensor:
    """Spherical k-means with k-means++ seeding: [N,D] unit vectors to [k,D] unit centres."""
    centres = [points[0]]
    distance = 2 - 2 * points @ points[0]
    for _ in range(k - 1):
        chosen = points[torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator).item()]
        centres.append(chosen)
        distance = torch.minimum(distance, 2 - 2 * points @ chosen)
    centre = torch.stack(centres)
    for _ in range(rounds):
        label = (points @ centre.T).argmax(-1)
        total = torch.zeros_like(centre).index_add_(0, label, points)
        empty = total.norm(dim=-1) < 1e-6
        centre = torch.where(empty[:, None], centre, F.normalize(total, dim=-1))
    return centre
