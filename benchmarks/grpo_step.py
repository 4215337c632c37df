"""A GRPO step of both halves of the tiny GLM-Image: this package's trainer against the same step out of stock parts.

    python -m benchmarks.grpo_step --out benchmarks/results/grpo_step.json

Stock parts: the prompt repeated per plan; transformers' `generate` for the tokens; a call of diffusers' pipeline with
these tokens for the pictures; a forward pass of either half for the log-probs that ratios start from; one more with
gradient, plain autograd, the clipped ratio, AdamW. Both sides draw the same number of pictures of the same prompts,
score them with the same calculator, update both halves once, and take their steps in turn in one process, so that a
machine that is slow for a minute is slow for both. Its noise is the pipeline's (an ODE), and its log-probs are those of
Gaussian steps at the latents it went through: what they cost is measured, not what they teach. Prints JSON: medians,
the median of the ratios step by step with its 95 % interval (bootstrap), and what a step consists of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImagePipeline
from torch import Tensor
from transformers import LogitsProcessorList

from benchmarks.quickstart import machine
from benchmarks.rollout import CodebookOnly
from benchmarks.two_revisions import ROOT, interval
from glm_training.config import load_config
from glm_training.models.glm_image.tiny import TINY_FOLDER
from glm_training.rewards import RewardBatch
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world

SIZE, STEPS, PROMPTS, PLANS, RENDERS = 128, 5, 4, 8, 2
OVERRIDES = [
    f"training.batch_size={PROMPTS}",
    f"rollout.plans_per_prompt={PLANS}",
    f"rollout.renders_per_plan={RENDERS}",
    f"model.dit.num_inference_steps={STEPS}",
    "reward.grpo.dit.method=flow_grpo",
    "reward.grpo.dit.timesteps_per_sample=null",
    "reward.grpo.dit.kl_coef=0",
    "reward.grpo.ar.kl_coef=0",
    "reward.grpo.updates_per_rollout=1",
    "training.max_steps=1000",
    "evaluation.enabled=false",
    "logging.log_images=false",
    "logging.use_tensorboard=false",
]


class Ours:
    """The reward trainer of configs/quickstart.yaml, with a group of plans and Flow-GRPO for the DiT half."""

    def __init__(self, folder: Path) -> None:
        config = load_config(ROOT / "configs/quickstart.yaml", [*OVERRIDES, f"output_dir={folder}/run"])
        trainer = build_trainer(config, init_world(False, None))
        assert isinstance(trainer, RewardTrainer)
        self.trainer = trainer
        trainer.prepare()

    def step(self) -> dict[str, float]:
        """Seconds by phase."""
        figures = self.trainer.training_step()
        self.trainer.step += 1
        return {name: float(value) for name, value in figures.items() if name.startswith("time/")}


class Stock:
    """The same step by a composer of stock parts."""

    def __init__(self, calculator: Any, dataset: Any) -> None:
        self.pipeline: Any = GlmImagePipeline.from_pretrained(TINY_FOLDER, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.calculator, self.dataset, self.taken = calculator, dataset, 0
        self.ar, self.dit = self.pipeline.vision_language_encoder, self.pipeline.transformer
        self.codes = self.ar.model.vqmodel.config.num_embeddings
        self.ar.model.visual.requires_grad_(False)
        self.ar.model.vqmodel.requires_grad_(False)
        halves = ([p for p in self.ar.parameters() if p.requires_grad], list(self.dit.parameters()))
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=rate) for parameters, rate in zip(halves, (1e-4, 3e-5), strict=True)
        ]

    def step(self) -> dict[str, float]:
        """Seconds by phase."""
        laps: dict[str, float] = {}
        rows = [(self.taken + i) % len(self.dataset) for i in range(PROMPTS)]
        self.taken += PROMPTS
        batch = self.dataset.batch(rows)
        prompts = [prompt for prompt in batch.prompts for _ in range(PLANS)]
        with torch.no_grad():
            inputs, sequences = lap(laps, "tokens", lambda: self.tokens(prompts))
            rendered = [prompt for prompt in prompts for _ in range(RENDERS)]
            plans = sequences[:, -self.large :].repeat_interleave(RENDERS, dim=0)
            images, latents, condition = lap(laps, "pictures", lambda: self.pictures(rendered, plans))
            shown = RewardBatch(images, rendered, batch.targets.repeat_interleave(PLANS * RENDERS, dim=0))
            rewards = lap(laps, "scores", lambda: self.calculator.compute_rewards(shown).total)
            old_tokens = lap(laps, "log-probs", lambda: self.token_log_probs(inputs, sequences))
            old_steps = lap(
                laps, "log-probs", lambda: [self.step_log_prob(latents, condition, k) for k in range(STEPS)]
            )
        groups = rewards.view(PROMPTS, PLANS, RENDERS)
        plans_gain = groups.mean(2) - groups.mean((1, 2))[:, None]
        renders_gain = groups - groups.mean(2, keepdim=True)
        gains = [(gain / (gain.std() + 1e-4)).flatten() for gain in (plans_gain, renders_gain)]
        lap(laps, "AR update", lambda: self.update_ar(inputs, sequences, old_tokens, gains[0]))
        lap(laps, "DiT update", lambda: self.update_dit(latents, condition, old_steps, gains[1]))
        return laps

    def tokens(self, prompts: list[str]) -> tuple[Any, Tensor]:
        conversations = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        options = {"padding": True, "padding_side": "left", "target_h": SIZE, "target_w": SIZE}
        inputs = self.pipeline.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        self.large = int(inputs["image_grid_thw"][0].prod())
        count = int(inputs["image_grid_thw"][:2].prod(-1).sum())
        kept = LogitsProcessorList([CodebookOnly(self.codes)])
        options = {
            "max_new_tokens": count,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "logits_processor": kept,
        }
        return inputs, self.ar.generate(**inputs, **options)

    def pictures(self, prompts: list[str], plans: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """Pictures, the latents before each step and after the last, and what the transformer was told."""
        side = SIZE // 32
        prior = plans.view(-1, 1, side, side).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)
        start = torch.randn(len(prompts), self.dit.config.in_channels, SIZE // 8, SIZE // 8)
        seen = [start]

        def keep(pipeline: Any, index: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.append(given["latents"])
            return given

        images = self.pipeline(
            prompt=prompts,
            prior_token_ids=prior,
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            latents=start,
            output_type="pt",
            callback_on_step_end=keep,
        ).images
        glyphs, _ = self.pipeline.encode_prompt(prompts, False)
        condition = {
            "encoder_hidden_states": glyphs,
            "prior_token_id": prior,
            "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
            "target_size": torch.full((len(prompts), 2), float(SIZE)),
            "crop_coords": torch.zeros(len(prompts), 2),
        }
        return images, seen, condition

    def token_log_probs(self, inputs: Any, sequences: Tensor) -> Tensor:
        """[B, T]."""
        length = inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, length:])], dim=1)
        grids = {name: inputs[name] for name in ("image_grid_thw", "images_per_sample")}
        logits = self.ar(input_ids=sequences, attention_mask=mask, **grids).logits[:, length - 1 : -1, : self.codes]
        return logits.float().log_softmax(-1).gather(-1, sequences[:, length:, None]).squeeze(-1)

    def step_log_prob(self, latents: list[Tensor], condition: dict[str, Any], k: int) -> Tensor:
        """[B] of step k, as of a Gaussian around where the velocity leads."""
        scheduler = self.pipeline.scheduler
        time = scheduler.timesteps[k].expand(len(latents[k])) - 1
        velocity = self.dit(hidden_states=latents[k], timestep=time, return_dict=False, **condition)[0]
        length = scheduler.sigmas[k + 1] - scheduler.sigmas[k]
        mean, deviation = latents[k] + velocity * length, 0.7 * length.abs().sqrt()
        return -((latents[k + 1] - mean) ** 2 / (2 * deviation**2)).mean(dim=(1, 2, 3))

    def update_ar(self, inputs: Any, sequences: Tensor, old: Tensor, advantages: Tensor) -> None:
        ratio = (self.token_log_probs(inputs, sequences) - old).exp()
        self.descend(0, clipped(ratio, advantages[:, None], 0.2))

    def update_dit(
        self, latents: list[Tensor], condition: dict[str, Any], old: list[Tensor], advantages: Tensor
    ) -> None:
        for k in range(STEPS):
            ratio = (self.step_log_prob(latents, condition, k) - old[k]).exp()
            (clipped(ratio, advantages, 1e-4) / STEPS).backward()
        self.descend(1, None)

    def descend(self, half: int, loss: Tensor | None) -> None:
        if loss is not None:
            loss.backward()
        optimizer = self.optimizers[half]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def clipped(ratio: Tensor, advantages: Tensor, width: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - width, 1 + width) * advantages).mean()


def lap(laps: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    found = work()
    laps[name] = laps.get(name, 0.0) + time.perf_counter() - started
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    phases: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder))
        arms = {"ours": ours, "stock": Stock(ours.trainer.calculator, ours.trainer.dataset)}
        for turn in range(arguments.steps + 1):
            for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
                started = time.perf_counter()
                phases[name].append(arms[name].step())
                seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for slow, fast in zip(seconds["stock"][1:], seconds["ours"][1:], strict=True)]
    report = {
        "machine": machine(),
        "threads": arguments.threads,
        "pictures": PROMPTS * PLANS * RENDERS,
        "seconds": {name: round(statistics.median(times[1:]), 3) for name, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_95": interval(ratios),
        "phases": {
            name: {key: round(statistics.median(row[key] for row in rows[1:]), 3) for key in rows[-1]}
            for name, rows in phases.items()
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
