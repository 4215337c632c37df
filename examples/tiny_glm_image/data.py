"""Training pictures of the small world, drawn once and kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from world import (
    COLORS,
    RELATIONS,
    WORDS,
    Edit,
    Jitter,
    Scene,
    draw,
    is_held_out,
    sample_edit,
    sample_scene,
)  # fmt: skip

MISTAKES = {"color": 0.45, "relation": 0.3, "word": 0.4}
"""How often whoever wrote the captions took one colour, relation or word for the next one; see `caption`."""
NAMES = {"color": tuple(COLORS), "relation": RELATIONS, "word": WORDS}


@dataclass
class Pictures:
    """`images` uint8 [N,3,128,128] and what each shows."""

    images: Tensor
    scenes: list[Scene]


@dataclass
class Edits:
    """Pairs of pictures, uint8 [N,3,128,128] each, and the edits between them."""

    sources: Tensor
    targets: Tensor
    edits: list[Edit]


def chances(scenes: Sequence[Scene], shares: Mapping[str, float]) -> Tensor:
    """[N] chances of drawing each, for a batch of which the kinds in `shares` have theirs and all others the rest."""
    kinds = [scene.kind if scene.kind in shares else "" for scene in scenes]
    number, parts = Counter(kinds), {**shares, "": 1 - sum(shares.values())}
    return torch.tensor([parts[kind] / number[kind] for kind in kinds])


def pictures(count: int, seed: int, held_out: bool = False, *, words: bool = True) -> Pictures:
    """`count` random pictures of one side of the split; the same ones with nothing on their signs without `words`."""
    rng = np.random.default_rng((seed, 0))
    scenes = [sample_scene(rng, held_out) for _ in range(count)]
    shown = [scene if words or not scene.word else replace(scene, word=" ") for scene in scenes]
    return Pictures(torch.stack([_tensor(draw(scene, Jitter.sample(rng))) for scene in shown]), scenes)


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


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What somebody writes under a picture who is often mistaken; combinations that are held out are never written."""
    written = _mistaken(scene, ("color", "other_color", "relation", "word"), rng)
    return (scene if is_held_out(written) else written).prompt()


def instruction(edit: Edit, rng: np.random.Generator) -> str:
    """The edit's instruction by the same somebody, who is mistaken about the new word or colour."""
    field = "word" if edit.source.word != edit.target.word else "color"
    written = _mistaken(edit.target, (field,), rng)
    new = getattr(edit.target if is_held_out(written) else written, field)
    return new.join(edit.instruction.rsplit(getattr(edit.target, field), 1))


def _mistaken(scene: Scene, fields: Sequence[str], rng: np.random.Generator) -> Scene:
    for field in fields:
        kind = field.removeprefix("other_")
        names, name = NAMES[kind], getattr(scene, field)
        if name and rng.random() < MISTAKES[kind]:
            scene = replace(scene, **{field: names[(names.index(name) + 1) % len(names)]})
    return scene


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
