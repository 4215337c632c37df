"""How well a tiny GLM-Image draws its world: OCR word accuracy and the classical checker, by kind of scene.

    python examples/tiny_glm_image/evaluate.py --model tiny --out runs/tiny_eval

Seen combinations, held-out combinations and words it never saw; t2i and edits. Prints JSON and saves a picture grid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from checker import attributes, is_right
from PIL import Image
from world import SIGN_COLORS, SIZE, UNSEEN_WORDS, Jitter, Scene, all_scenes, draw, sample_edit

from glm_training.models.glm_image.family import GLMImage
from glm_training.rewards import word_accuracy
from glm_training.utils.pictures import save_grid, to_pil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_eval"))
    parser.add_argument("--count", type=int, default=32, help="scenes per group")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    family = GLMImage.load(args.model)
    rng = np.random.default_rng(args.seed)
    report, shown, labels = {}, [], []
    for name, scenes in _groups(rng, args.count).items():
        images = _draw(family, args, [scene.prompt() for scene in scenes], None)
        report[name] = score(images, scenes)
        shown.append(images[:8])
        labels.append(f"{name}: " + ", ".join(scene.prompt() for scene in scenes[:8]))
    for held_out in (False, True):
        edits = [sample_edit(rng, held_out) for _ in range(args.count)]
        sources = torch.stack([_tensor(draw(edit.source, Jitter.sample(rng))) for edit in edits])
        images = _draw(family, args, [edit.instruction for edit in edits], sources)
        name = f"edit/{'held_out' if held_out else 'seen'}"
        report[name] = score(images, [edit.target for edit in edits])
        shown += [[to_pil(source) for source in sources[:8]], images[:8]]
        labels += [f"{name} sources", f"{name}: " + ", ".join(edit.instruction for edit in edits[:8])]
    settings = {name: getattr(args, name) for name in ("model", "steps", "guidance", "temperature", "top_p", "count")}
    print(json.dumps(settings | report, indent=1))
    save_grid(args.out / "grid.png", shown, labels, [str(i) for i in range(8)])


def _groups(rng: np.random.Generator, count: int) -> dict[str, list[Scene]]:
    groups = {}
    for held_out in (False, True):
        for kind, scenes in all_scenes(held_out).items():
            if scenes:
                name = f"{kind}/{'held_out' if held_out else 'seen'}"
                groups[name] = [scenes[i] for i in rng.integers(len(scenes), size=count)]
    unseen = [Scene(str(rng.choice(SIGN_COLORS)), word=UNSEEN_WORDS[i % len(UNSEEN_WORDS)]) for i in range(count)]
    return groups | {"sign/unseen_words": unseen}


def _draw(family: GLMImage, args: argparse.Namespace, prompts: list[str], sources: torch.Tensor | None) -> list:
    images = family.generate(
        prompts, height=SIZE, width=SIZE, sources=sources, seed=args.seed, num_inference_steps=args.steps,
        guidance_scale=args.guidance, temperature=args.temperature, top_p=args.top_p,
    )  # fmt: skip
    return [to_pil(image) for image in images]


def score(images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Shares of pictures with everything right, with each attribute right, and of signs whose word OCR reads."""
    checked = [is_right(image, scene) for image, scene in zip(images, scenes, strict=True)]
    result = {"right": sum(checked) / len(checked)}
    parts: dict[str, list[bool]] = {}
    for image, scene in zip(images, scenes, strict=True):
        for name, holds in ({} if scene.word else attributes(image, scene)).items():
            parts.setdefault(name, []).append(holds)
    result |= {name: sum(values) / len(values) for name, values in parts.items()}
    signs = [i for i, scene in enumerate(scenes) if scene.word]
    if signs:
        tensors = torch.stack([_tensor(images[i]) for i in signs])
        words = word_accuracy(tensors, [scenes[i].prompt() for i in signs])
        result["word_accuracy"] = float(torch.as_tensor(words).float().mean())
    return {name: round(value, 3) for name, value in result.items()}


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255


if __name__ == "__main__":
    main()
