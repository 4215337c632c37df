"""How far ratios start off 1 in low precision, what the shipped clips do about it, and what `rollout.rescore` costs.

    python -m benchmarks.rescoring --out benchmarks/results/rescoring.json

The trained tiny model, both halves, one rollout per precision. `drawn`: how far a replay of the rollout with the very
weights that drew it lies from what was recorded, in the groupings that an update takes: all rows at once, in
micro-batches, in two halves. `first_step`: what a training step that changes nothing (a learning rate of 1e-30, two
updates per rollout) reports, without rescoring and with it. `seconds`: medians of whole steps, the two taking turns.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quickstart import machine
from glm_training.config import load_config
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world

ROOT = Path(__file__).parents[1]
PRECISIONS = {
    "fp32": ("training.mixed_precision=no", "model.torch_dtype=float32"),
    "bf16 autocast": ("training.mixed_precision=bf16", "model.torch_dtype=float32"),
    "fp16 autocast": ("training.mixed_precision=fp16", "model.torch_dtype=float32"),
    "bf16 weights under LoRA": ("training.mixed_precision=no", "model.torch_dtype=bfloat16", "lora.enabled=true"),
}
CLIPS = {"ar": (0.2, 1e-3), "dit": (1e-4, 1e-5)}
"""Clip ranges of the shipped recipes: GRPO and GSPO; Flow-GRPO and Flow-GRPO-Fast."""
STILL = ("training.learning_rate=1e-30", "training.warmup_steps=0", "reward.grpo.updates_per_rollout=2")
GROUPINGS = {"all rows": (1, None), "micro-batches of 3": (1, 3), "two halves": (2, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--timed", nargs="*", default=["bf16 autocast"], choices=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="further key=value words of the configuration")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "rescoring",
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "precisions": {name: measured(PRECISIONS[name], args.overrides) for name in args.precisions},
        "seconds": {name: cost(PRECISIONS[name], args.overrides, args.repeats) for name in args.timed},
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def trainer_of(folder: str, *words: str) -> RewardTrainer:
    """Four prompts, eight pictures each: four plans, two renders; SSIM with the target is the reward."""
    shape = ("model.component=both", "rollout.plans_per_prompt=4", "rollout.renders_per_plan=2")
    options = ("reward={metrics: {structure: 1.0}, options: {structure: {reference: target}}}", f"output_dir={folder}")
    config = load_config(ROOT / "benchmarks/warmth/warmth.yaml", [*shape, *options, *words])
    trainer = build_trainer(config, init_world(True, None))
    assert isinstance(trainer, RewardTrainer)
    return trainer


def measured(precision: tuple[str, ...], overrides: list[str]) -> dict[str, Any]:
    """Deviations of replays, and the figures of a step that changes nothing."""
    found: dict[str, Any] = {"drawn": {}, "first_step": {}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, *precision, *overrides)
        batch, positions = trainer.next_batch()
        rollout = trainer.draw(batch, positions, on_step=None)
        trainer.family.train()
        for name, (updates, micro) in GROUPINGS.items():
            found["drawn"][name] = {
                "ar": spread(deviations(trainer, rollout.plans, updates, micro), CLIPS["ar"]),
                "dit": spread(deviations(trainer, rollout.renders, updates, micro), CLIPS["dit"]),
            }
        for rescore in ("false", "true"):
            clips = ("reward.grpo.ar.clip_range=0.2", "reward.grpo.dit.clip_range=1e-5", f"rollout.rescore={rescore}")
            still = trainer_of(folder, *precision, *STILL, *clips, "rollout.micro_batch_size=6", *overrides)
            wanted = ("clip_fraction", "ratio_deviation_max", "replay_gap", "replay_gap_max")
            figures = still.training_step()
            found["first_step"]["rescored" if rescore == "true" else "as drawn"] = {
                key: value for key, value in figures.items() if key.split("/")[-1] in wanted
            }
    return found


@torch.no_grad()
def deviations(trainer: RewardTrainer, drawn: Any, updates: int, micro: int | None) -> Tensor:
    """|ratio - 1| of every action of `drawn` (an ARRollout or a Trajectory), replayed in slices as an update has."""
    half = "ar" if hasattr(drawn, "tokens") else "dit"
    component, method = trainer.parts[half].component, trainer.ar_method if half == "ar" else trainer.dit_method
    rows = torch.arange(len(drawn.log_probs), device=drawn.log_probs.device)
    collected = []
    for update in range(updates):
        own = rows[rows % updates == update]
        for piece in own.split(micro or len(own)):
            part = drawn.select(piece)
            with trainer.autocast():
                if half == "ar":
                    scores = method.score(component, part)  # type: ignore[union-attr]
                else:
                    scores, _ = method.rescored(component, part)  # type: ignore[union-attr]
            collected.append((scores - part.log_probs).expm1().abs().flatten())
    return torch.cat(collected)


def spread(values: Tensor, clips: tuple[float, ...]) -> dict[str, Any]:
    """Largest and mean deviation, and the share of actions beyond each clip range before anything was learned."""
    beyond = {f"{clip:g}": round((values > clip).float().mean().item(), 4) for clip in clips}
    return {"max": values.max().item(), "mean": values.mean().item(), "share_beyond_clip": beyond}


def cost(precision: tuple[str, ...], overrides: list[str], repeats: int) -> dict[str, Any]:
    """Seconds of a training step without and with rescoring, for one and for two updates per rollout."""
    found: dict[str, Any] = {}
    for updates in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            words = (*precision, f"reward.grpo.updates_per_rollout={updates}", "reward.grpo.gate=false", *overrides)
            arms = {
                name: trainer_of(folder, *words, f"rollout.rescore={value}")
                for name, value in (("as drawn", "false"), ("rescored", "true"))
            }
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for repeat in range(repeats + 1):
                for name, trainer in arms.items():
                    started = time.perf_counter()
                    trainer.training_step()
                    if repeat:  # the first one warms up
                        seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found[f"{updates} updates per rollout"] = {
            "median": {name: round(value, 3) for name, value in medians.items()},
            "all": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
            "ratio": round(medians["rescored"] / medians["as drawn"], 3),
        }
    return found


if __name__ == "__main__":
    main()
