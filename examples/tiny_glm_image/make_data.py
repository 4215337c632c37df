"""Writes the sample sets under data/: prompts and pictures of the small world, t2i and i2i, each with a held-out split.

    python examples/tiny_glm_image/make_data.py

The held-out prompts are combinations that the tiny model never saw, and no training prompt is among them: what is
learned from hundreds of others must carry over. A fifth of those are such combinations too, the rest seen ones.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from world import Edit, Jitter, Scene, all_scenes, draw, sample_edit

HELD_OUT = {"sign": 32, "relation": 58, "count": 14}
"""Prompts that scores are taken of; all other combinations that the model never saw are trained on."""
SEEN = {"sign": 88, "relation": 43, "count": 32}
"""Training prompts of combinations that the model saw."""
EDITS = (200, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    train, held_out = split_scenes(rng)
    for folder, scenes in ((args.out / "t2i", train), (args.out / "t2i" / "held_out", held_out)):
        pictures = [draw(scene, Jitter(0, 0)) for scene in scenes]
        write(folder, [scene.prompt() for scene in scenes], target_images=pictures)
    edits = distinct_edits(rng, sum(EDITS))
    for folder, part in ((args.out / "i2i", edits[: EDITS[0]]), (args.out / "i2i" / "held_out", edits[EDITS[0] :])):
        jitters = [Jitter.sample(rng) for _ in part]
        sources = [draw(edit.source, jitter) for edit, jitter in zip(part, jitters, strict=True)]
        targets = [draw(edit.target, jitter) for edit, jitter in zip(part, jitters, strict=True)]
        write(folder, [edit.instruction for edit in part], target_images=targets, source_images=sources)


def split_scenes(rng: np.random.Generator) -> tuple[list[Scene], list[Scene]]:
    """Training and held-out scenes, kinds interleaved."""
    unseen = {kind: shuffled(rng, all_scenes(True)[kind]) for kind in HELD_OUT}
    held_out = {kind: scenes[: HELD_OUT[kind]] for kind, scenes in unseen.items()}
    train = {kind: scenes[HELD_OUT[kind] :] for kind, scenes in unseen.items()}
    train = {kind: scenes + shuffled(rng, all_scenes(False)[kind])[: SEEN[kind]] for kind, scenes in train.items()}
    return interleaved(train), interleaved(held_out)


def shuffled(rng: np.random.Generator, scenes: Sequence[Scene]) -> list[Scene]:
    return [scenes[i] for i in rng.permutation(len(scenes))]


def interleaved(groups: Mapping[str, Sequence[Scene]]) -> list[Scene]:
    """Every kind throughout, as often as it is there."""
    placed = [(i / len(group), scene) for group in groups.values() for i, scene in enumerate(group)]
    return [scene for _, scene in sorted(placed, key=lambda pair: pair[0])]


def distinct_edits(rng: np.random.Generator, count: int) -> list[Edit]:
    """Edits of different sources, so that a held-out one shows what no training picture does."""
    found: dict[Scene, Edit] = {}
    while len(found) < count:
        edit = sample_edit(rng, held_out=True)
        found.setdefault(edit.source, edit)
    return list(found.values())


def write(folder: Path, prompts: list[str], **images: list[Image.Image]) -> None:
    """`prompts.txt` and one numbered folder per kind of image; what an earlier run wrote is replaced."""
    for name, pictures in images.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(folder / name / f"{i}.png", optimize=True)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
