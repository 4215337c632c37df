"""Draws the small world as captioned pictures, for VGT: a folder with a .txt beside each picture, and a held-out one.

    python examples/tiny_glm_image/make_captioned.py --out runs/tiny_world

The held-out pictures show combinations that no training picture has. `--kinds` leaves the others out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from world import Jitter, Scene, draw, sample_scene

KINDS = ("sign", "relation", "count", "single")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, count, held_out in (("train", args.train, False), ("held_out", args.held_out, True)):
        rng = np.random.default_rng([args.seed, held_out])
        write(args.out / name, [scene_of(rng, held_out, args.kinds) for _ in range(count)], rng, args.side)
        print(f"{count} pictures in {args.out / name}")


def scene_of(rng: np.random.Generator, held_out: bool, kinds: list[str]) -> Scene:
    """A random scene of one of the `kinds`."""
    while True:
        scene = sample_scene(rng, held_out)
        if scene.kind in kinds:
            return scene


def write(folder: Path, scenes: list[Scene], rng: np.random.Generator, side: int) -> None:
    """`00000.png` and `00000.txt` of each scene. Raises SystemExit where the folder has files already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} has files already: remove it, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        picture = draw(scene, Jitter.sample(rng)).resize((side, side), Image.Resampling.LANCZOS)
        picture.save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(scene.prompt() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
