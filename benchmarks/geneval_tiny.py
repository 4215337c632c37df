"""GenEval of the tiny GLM-Image before and after its AR half is trained on drawn shapes; the classical checker judges.

    python -m benchmarks.geneval_tiny --out benchmarks/results/geneval_tiny.json

Both models draw the 48 prompts of data/benchmarks/geneval_tiny.jsonl from the same noise. No prompt of them is trained
on. What is there in --runs, a trained checkpoint or pictures, is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quickstart import ROOT, machine

TRAINING = [
    "model.component=ar", "training.use_reward=false", "training.batch_size=16", "training.ar_learning_rate=3e-4",
    "training.lr_scheduler=cosine", "training.warmup_steps=20", "evaluation.enabled=false", "logging.log_interval=10",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/geneval_tiny"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--samples", type=int, default=2, help="pictures per prompt")
    args = parser.parse_args()
    runs = args.runs.resolve()
    checkpoint, seconds = runs / f"trained/checkpoints/step-{args.steps:06d}", None
    if not checkpoint.exists():
        run("examples/tiny_glm_image/make_benchmarks.py", "--pictures", runs / "shapes")
        data = [f"data.prompts_file={runs}/shapes/prompts.txt", f"data.target_images_dir={runs}/shapes/target_images"]
        steps = [f"training.max_steps={args.steps}", f"logging.save_interval={args.steps}"]
        started = time.time()
        run("train.py", "--config", "configs/quickstart.yaml", *TRAINING, *data, *steps, f"output_dir={runs}/trained")
        seconds = round(time.time() - started)
    report: dict[str, Any] = {"machine": machine(), "steps": args.steps, "training_seconds": seconds}
    right = {}
    for name, model in (("before", "tiny"), ("after", checkpoint)):
        folder = runs / name
        words = ["--suite", "geneval", "--detector", "shapes", "--prompts", "data/benchmarks/geneval_tiny.jsonl"]
        how = ["--samples", args.samples, "--steps", 8, "--guidance", 1]
        run("-m", "glm_training.cli.main", "evaluate", *words, *how, "--model", model, "--out", folder)
        told = json.loads((folder / "results.json").read_text())
        report[name] = [
            {key: rounded(figure[key]) for key in ("name", "value", "error", "count", "of")}
            for figure in told["figures"]
        ]
        report["judge"], report["sampling"] = told["judge"], told["settings"]["pictures"]["sampling"]
        right[name] = [json.loads(line)["correct"] for line in (folder / "results.jsonl").read_text().splitlines()]
    report["change"] = change(right["before"], right["after"], args.samples)
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n")


def change(before: list[bool], after: list[bool], samples: int) -> dict[str, float]:
    """Of the share of right pictures, prompt by prompt."""
    gains = [a - b for b, a in zip(before, after, strict=True)]
    prompts = [statistics.fmean(gains[start : start + samples]) for start in range(0, len(gains), samples)]
    error = statistics.stdev(prompts) / len(prompts) ** 0.5
    mean = statistics.fmean(prompts)
    return {
        "right_pictures": rounded(mean),
        "standard_error": rounded(error),
        "standard_errors": round(mean / error, 2),
    }


def rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def run(*words: object) -> None:
    """A command of this Python, in the root."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
