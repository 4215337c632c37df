"""Writes the preference pairs under data/preference: pictures of the small world, and a held-out split.

    python examples/tiny_glm_image/make_pairs.py

The preferred picture shows what the prompt says, in the middle; the rejected one has another colour and stands aside.
No prompt is in both splits.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from world import SIGN_COLORS, Jitter, Scene, all_scenes, draw

PAIRS, HELD_OUT = 8, 4
KINDS = ("sign", "count", "relation", "single")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/preference"))
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    groups = {kind: rng.permutation(np.array(all_scenes(False)[kind], dtype=object)) for kind in KINDS}
    scenes = [groups[KINDS[i % len(KINDS)]][i // len(KINDS)] for i in range(PAIRS + HELD_OUT)]
    shutil.rmtree(args.out, ignore_errors=True)
    write(args.out, scenes[:PAIRS], rng)
    write(args.out / "held_out", scenes[PAIRS:], rng)


def write(folder: Path, scenes: list[Scene], rng: np.random.Generator) -> None:
    """`metadata.jsonl` and the images of every pair."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, scene in enumerate(scenes):
        others = [color for color in SIGN_COLORS if color not in (scene.color, scene.other_color)]
        wrong = replace(scene, color=str(rng.choice(others)))
        side = int(rng.choice([-1, 1]))
        pictures = {"preferred": draw(scene, Jitter(0, 0)), "rejected": draw(wrong, Jitter(side, side))}
        for role, picture in pictures.items():
            picture.save(folder / "images" / f"{i}_{role}.png", optimize=True)
        lines.append({"prompt": scene.prompt()} | {role: f"images/{i}_{role}.png" for role in pictures})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
