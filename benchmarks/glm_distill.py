"""How good, and how fast, is a few-step GLM-Image beside its teacher?

    python train.py --config configs/glm_dit_distill_tiny.yaml training.max_steps=600 \
        logging.save_interval=100 checkpoint.save_total_limit=null
    python -m benchmarks.glm_distill --student runs/glm_dit_distill_tiny/checkpoints/step-*/pipeline

Draws the held-out prompts with the teacher at many and at few steps and with each student at few: the same plans (AR
tokens) and the same noise for all, so that only the renderer differs. SSIM with the target image, OCR accuracy of the
quoted words. `energy_distance`: between the latents of four renders of a plan and four of the teacher's at many steps,
mean over plans; the teacher's own, with other noise, is the floor. Images per second of the renderer (DiT and VAE) and
of the whole model, each the median of three runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quickstart import machine
from glm_training.data import T2IDataset, load_examples
from glm_training.evaluation.held_out import EvaluationSettings, evaluate
from glm_training.models.family import Sampling
from glm_training.models.glm_image.family import GLMImage
from glm_training.rewards import build_calculator
from glm_training.utils.distributed import World
from glm_training.utils.randomness import normal, uniform

ROOT = Path(__file__).parents[1]
SIDE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--student", type=Path, nargs="*", default=[], help="checkpoints/step-N/pipeline of runs")
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.5, help="of the teacher")
    parser.add_argument("--prompts", type=Path, default=ROOT / "data/t2i/held_out")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    teacher = GLMImage.load(args.teacher)
    arms = {
        f"teacher, {args.teacher_steps} steps": (teacher, args.teacher_steps, args.guidance),
        f"teacher, {args.steps} steps": (teacher, args.steps, args.guidance),
        f"teacher, {args.steps} steps, no guidance": (teacher, args.steps, 1.0),
        "teacher, 1 step, no guidance": (teacher, 1, 1.0),
    }
    for folder in args.student:
        name = f"student, {args.steps} steps, {folder.resolve().parent.name}"
        arms[name] = (GLMImage.load(str(folder)), args.steps, 1.0)
    data = held_out(args.prompts)
    report: dict[str, object] = {"machine": machine(), "prompts": len(data), "samples": args.samples}
    plans = Plans(teacher, data)
    reference = plans.renders(teacher, args.teacher_steps, args.guidance, seed=1)
    for name, (family, steps, guidance) in arms.items():
        distance = energy_distance(plans.renders(family, steps, guidance, seed=2), reference)
        figures = {"energy_distance": round(distance, 3), **speed(family, data, steps, guidance)}
        report[name] = scores(family, data, steps, guidance, args.samples) | figures
        sys.stderr.write(f"{name}: {report[name]}\n")
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def held_out(folder: Path) -> T2IDataset:
    """The prompts of `folder` with their target images."""
    examples = load_examples(
        "t2i", folder / "prompts.txt", folder / "target_images", None, height=SIDE, width=SIDE, require_targets=True
    )
    return T2IDataset(examples, height=SIDE, width=SIDE)


def scores(family: GLMImage, data: T2IDataset, steps: int, guidance: float, samples: int) -> dict[str, float]:
    """Means over the held-out prompts, `samples` images each."""
    calculator = build_calculator(None, {"structure": 1.0, "text_accuracy": 1.0})
    settings = EvaluationSettings(SIDE, SIDE, samples, 1234, Sampling(0.9, 0.75, True, steps, guidance), 48)
    result = evaluate(family, calculator, data.batch(range(len(data))), settings, World(), keep_images=0)
    means = result.means()
    return {"ssim": round(means["structure"], 4), "ocr_accuracy": round(means["text_accuracy"], 4)}


class Plans:
    """One plan of the teacher's for each of the first `count` prompts, to be rendered by any model."""

    @torch.no_grad()
    def __init__(self, teacher: GLMImage, data: T2IDataset, count: int = 24) -> None:
        self.prompts = data.batch(range(min(count, len(data)))).prompts
        prompt = teacher.ar.encode_prompts(self.prompts, SIDE, SIDE, None)
        draws = uniform(0, "benchmark/plans", [(i,) for i in range(len(self.prompts))], (prompt.T,))
        rollout = teacher.ar.rollout(prompt, 1, draws, temperature=0.9, top_p=0.75, do_sample=True)
        self.tokens, self.grid = rollout.large_tokens, prompt.large_grid

    def renders(self, family: GLMImage, steps: int, guidance: float, seed: int, count: int = 4) -> Tensor:
        """Latents [plans, count, dims] of `count` renders of each plan."""
        dit = family.dit
        condition = dit.condition(self.prompts, self.tokens, self.grid).repeat_interleave(count)
        names = [(i, m) for i in range(len(self.prompts)) for m in range(count)]
        noise = normal(seed, "benchmark/renders", names, dit.latent_shape(SIDE, SIDE))
        schedule = dit.schedule(steps, SIDE, SIDE)
        drawn = dit.sample(noise, condition, schedule, guidance_scale=guidance, micro_batch_size=48).final
        return drawn.view(len(self.prompts), count, -1)


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples [plans, n, dims] each, unbiased, mean over plans."""
    pairs = first.shape[1] * (first.shape[1] - 1)
    own = [torch.cdist(x, x).sum((1, 2)) / pairs for x in (first, second)]
    return float((2 * torch.cdist(first, second).mean((1, 2)) - own[0] - own[1]).mean())


@torch.no_grad()
def speed(family: GLMImage, data: T2IDataset, steps: int, guidance: float, batch: int = 16) -> dict[str, float]:
    """Images per second for `batch` images at once: of the renderer, and with the plans written as well."""
    prompts = data.batch(range(batch)).prompts
    prompt = family.ar.encode_prompts(prompts, SIDE, SIDE, None)
    noise = normal(0, "benchmark", [(i,) for i in range(batch)], family.dit.latent_shape(SIDE, SIDE))
    schedule = family.dit.schedule(steps, SIDE, SIDE)
    whole, renderer = [], []
    for _ in range(3):
        started = time.perf_counter()
        draws = torch.full((batch, prompt.T), 0.5)
        plans = family.ar.rollout(prompt, 1, draws, temperature=0.9, top_p=0.75, do_sample=True)
        condition = family.dit.condition(prompts, plans.large_tokens, prompt.large_grid)
        planned = time.perf_counter()
        latents = family.dit.sample(noise, condition, schedule, guidance_scale=guidance).final
        family.dit.decode_latents(latents)
        ended = time.perf_counter()
        whole.append(ended - started)
        renderer.append(ended - planned)
    return {
        "renderer_images_per_second": round(batch / statistics.median(renderer), 2),
        "images_per_second": round(batch / statistics.median(whole), 2),
    }


if __name__ == "__main__":
    main()
