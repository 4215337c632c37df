"""Writes the sample sets under data/: prompts and pictures of the small world, t2i and i2i, each with a held-out split.

    python examples/tiny_glm_image/make_data.py

All prompts are combinations that the tiny model never saw; the two splits share none. The t2i targets all stand in the
middle of the picture, where the model itself puts things anywhere: a style of composition that it can learn from them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from world import Edit, Jitter, Scene, all_scenes, draw, sample_edit

TRAIN = {"sign": 20, "relation": 20, "count": 8}
HELD_OUT = {"sign": 12, "relation": 18, "count": 6}
EDITS = (32, 16)


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
    """Held-out scenes of the world, `TRAIN` and `HELD_OUT` of each kind, kinds interleaved."""
    groups = {kind: list(rng.permutation(np.array(all_scenes(True)[kind], dtype=object))) for kind in TRAIN}
    train = [(i / TRAIN[kind], scene) for kind, group in groups.items() for i, scene in enumerate(group[: TRAIN[kind]])]
    rest = {kind: group[TRAIN[kind] :] for kind, group in groups.items()}
    held = [(i / HELD_OUT[k], scene) for k, group in rest.items() for i, scene in enumerate(group[: HELD_OUT[k]])]
    return [s for _, s in sorted(train, key=lambda e: e[0])], [s for _, s in sorted(held, key=lambda e: e[0])]


def distinct_edits(rng: np.random.Generator, count: int) -> list[Edit]:
    """Edits no two of which have the same source and instruction."""
    found: dict[tuple[Scene, str], Edit] = {}
    while len(found) < count:
        edit = sample_edit(rng, held_out=True)
        found.setdefault((edit.source, edit.instruction), edit)
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
