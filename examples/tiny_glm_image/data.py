"""Training pictures of the small world, drawn once and kept in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from world import Edit, Jitter, Scene, draw, sample_edit, sample_scene


@dataclass
class Pictures:
    """`images` uint8 [N,3,128,128] and what each shows."""

    images: Tensor
    scenes: list[Scene]

    def weights(self, sign_share: float) -> Tensor:
        """[N] chances of drawing each, for a batch of which `sign_share` are signs."""
        signs = torch.tensor([bool(scene.word) for scene in self.scenes])
        return torch.where(signs, sign_share / signs.sum(), (1 - sign_share) / (~signs).sum())


@dataclass
class Edits:
    """Pairs of pictures, uint8 [N,3,128,128] each, and the edits between them."""

    sources: Tensor
    targets: Tensor
    edits: list[Edit]


def pictures(count: int, seed: int, held_out: bool = False) -> Pictures:
    """`count` random pictures of one side of the split."""
    rng = np.random.default_rng((seed, 0))
    scenes = [sample_scene(rng, held_out) for _ in range(count)]
    return Pictures(torch.stack([_tensor(draw(scene, Jitter.sample(rng))) for scene in scenes]), scenes)


def edits(count: int, seed: int, held_out: bool = False) -> Edits:
    """`count` random edits whose targets lie on one side of the split."""
    rng = np.random.default_rng((seed, 1))
    chosen = [sample_edit(rng, held_out) for _ in range(count)]
    sources, targets = [], []
    for edit in chosen:
        jitter = Jitter.sample(rng)
        sources.append(_tensor(draw(edit.source, jitter)))
        targets.append(_tensor(draw(edit.target, jitter)))
    return Edits(torch.stack(sources), torch.stack(targets), chosen)


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
