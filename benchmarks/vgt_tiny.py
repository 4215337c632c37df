"""What the tiny VGT has learnt: figures of the runs of `configs/vgt_tiny_*.yaml`, in the folder they were made in.

    python -m benchmarks.vgt_tiny [autoencoder] [overfit] [prompts] [parallel] [--runs runs] [--out FILE]

autoencoder: PSNR of both stages on held-out pictures, over each picture's mean colour, and what noise of .1 of the
latents' own deviation per channel takes of it. overfit: what the run on four pictures of docs/vgt.md draws of them.
prompts: share of held-out captions drawn exactly right by the classical checker, and of shuffled ones, after the longer
run of docs/vgt.md; writes its picture. parallel: the same by how many latents are written at once, with the time that
takes. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.settings import processor
from glm_training.models.family import Sampling
from glm_training.models.vgt.autoencoder import Autoencoder
from glm_training.models.vgt.family import VGT
from glm_training.utils.pictures import save_grid, to_pil

ROOT = Path(__file__).parents[1]
CHECKED = 128
"""Pixels at which the checker looks at pictures."""
STEPS, GUIDANCE = 20, 2.5


def newest(run: Path) -> VGT:
    """The model of a run's newest checkpoint."""
    return VGT.load(run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip())


def pictures(folder: Path, count: int) -> tuple[Tensor, list[str]]:
    """Pictures [N, 3, H, W] in [0, 1] of a folder, and their captions."""
    files = sorted(folder.glob("*.png"))[:count]
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255 for file in files]
    return torch.stack(images), [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """[N] dB"""
    return -10 * (images - others).square().flatten(1).mean(1).log10()


@torch.no_grad()
def noisy_psnr(autoencoder: Autoencoder, images: Tensor, share: float) -> float:
    """Mean PSNR where latents get noise of `share` of their own deviation per channel."""
    latents = autoencoder.encode(images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    drawn = autoencoder.decode(latents + share * latents.std(dim=(0, 2, 3), keepdim=True) * noise)
    return psnr(drawn.clamp(0, 1), images).mean().item()


def autoencoder_figures(runs: Path) -> dict[str, Any]:
    images, _ = pictures(runs / "tiny_world" / "held_out", 256)
    flat = psnr(images.mean((2, 3), keepdim=True).expand_as(images), images).mean().item()
    found: dict[str, Any] = {"pictures": len(images), "mean_colour_db": flat}
    for stage in ("stage1", "stage2"):
        autoencoder = newest(runs / f"vgt_tiny_ae_{stage}").autoencoder
        whole = noisy_psnr(autoencoder, images, 0.0)
        found[stage] = {"psnr_db": whole, "lost_to_noise_db": whole - noisy_psnr(autoencoder, images, 0.1)}
    return found


def overfit_figures(runs: Path) -> dict[str, Any]:
    family, (images, captions) = newest(runs / "vgt_tiny_overfit"), pictures(runs / "four", 4)
    again = family.reconstruct(images)
    drawn = draw(family, captions, 1, guidance=1.0)
    return {"captions": captions, "psnr_db_against_the_autoencoder": psnr(drawn, again).tolist()}


def draw(family: VGT, captions: list[str], parallel: int, guidance: float = GUIDANCE) -> Tensor:
    sampling = Sampling(1.0, 1.0, True, STEPS, guidance, parallel)
    side = family.own_size()
    return family.draw(captions, height=side, width=side, seed=0, sampling=sampling, micro_batch_size=64)


def exactly_right(images: Tensor, captions: list[str]) -> Tensor:
    """[N] 1 where all that the caption says is there and nothing else."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny_glm_image"))
    from checker import parse, scene_score  # type: ignore[import-not-found]

    scores = []
    for image, caption in zip(images, captions, strict=True):
        shown = to_pil(image).resize((CHECKED, CHECKED), Image.Resampling.BICUBIC)
        scores.append(float(scene_score(shown, parse(caption)) >= 1 - 1e-6))
    return torch.tensor(scores)


def asked(runs: Path) -> tuple[VGT, Tensor, list[str]]:
    """The generator of docs/vgt.md's longer run, held-out pictures and their captions."""
    images, captions = pictures(runs / "tiny_shapes" / "held_out", 256)
    return newest(runs / "vgt_tiny_prompts_sft"), images, captions


def share(right: Tensor) -> dict[str, float]:
    return {"share": right.mean().item(), "standard_error": (right.var() / len(right)).sqrt().item()}


def prompt_figures(runs: Path) -> dict[str, Any]:
    family, images, captions = asked(runs)
    again = family.reconstruct(images)
    drawn = draw(family, captions, 1)
    right = exactly_right(drawn, captions)
    moved = captions[1:] + captions[:1]  # each picture is held against another one's caption
    shuffled = exactly_right(draw(family, moved, 1), captions)
    shown = [list(drawn[:8]), list(images[:8])]
    save_grid(ROOT / "docs" / "images" / "vgt_tiny_prompts.png", shown, ["drawn", "held-out picture"], captions[:8])
    error = ((right.var() + shuffled.var()) / len(right)).sqrt()
    counts = torch.tensor([caption.split()[0] in ("two", "three", "four") for caption in captions])
    return {
        "captions": len(captions),
        "exactly_right": share(right) | {"of_counts": share(right[counts]), "of_relations": share(right[~counts])},
        "asked_with_shuffled_captions": share(shuffled),
        "standard_errors_apart": ((right.mean() - shuffled.mean()) / error).item(),
        "the_autoencoders_own_pictures": share(exactly_right(again, captions)),
    }


def parallel_figures(runs: Path) -> dict[str, Any]:
    """By latents written at once, and by whether the queries of a group see each other."""
    family, _, captions = asked(runs)
    found = {}
    for parallel, seen in ((1, False), (4, False), (4, True), (16, False), (16, True)):
        family.queries_see_each_other = seen
        started = time.perf_counter()
        drawn = draw(family, captions, parallel)
        seconds = round(time.perf_counter() - started, 2)
        name = f"{parallel}{', queries see each other' * seen}"
        found[name] = {"seconds": seconds, **share(exactly_right(drawn, captions))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {
        "autoencoder": autoencoder_figures,
        "overfit": overfit_figures,
        "prompts": prompt_figures,
        "parallel": parallel_figures,
    }
    parser.add_argument("measures", nargs="*", choices=[*measures, []], default=list(measures))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vgt_tiny.json")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    for name in arguments.measures:
        known[name] = {"machine": processor()[0]} | measures[name](arguments.runs)
        print(json.dumps({name: known[name]}), flush=True)
        arguments.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
