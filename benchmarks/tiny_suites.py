"""GenEval and DPG-Bench of the tiny GLM-Image before and after the quickstart's run.

    python train.py --config configs/quickstart.yaml
    python -m benchmarks.tiny_suites --out benchmarks/results/tiny_suites.json

The classical checker of shapes judges. Both models draw the prompts of data/benchmarks from the same noise; the run is
trained on none of them. What is there in --runs is not drawn again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.quickstart import ROOT, machine

PROMPTS = "data/benchmarks"
SUITES = {
    "geneval": ["--prompts", f"{PROMPTS}/geneval_tiny.jsonl", "--detector", "shapes"],
    "dpg": [
        "--prompts", f"{PROMPTS}/dpg_tiny/prompts", "--questions", f"{PROMPTS}/dpg_tiny/questions.csv",
        "--judge", "shapes",
    ],
}  # fmt: skip
HOW = ["--samples", 4, "--steps", 8, "--guidance", 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny_suites"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="runs/quickstart", help="what was trained: a run or a checkpoint")
    args = parser.parse_args()
    runs = args.runs.resolve()
    report: dict[str, Any] = {"machine": machine(), "drawing": HOW}
    for suite, words in SUITES.items():
        scores = {}
        report[suite] = {}
        for name, model in (("before", "tiny"), ("after", args.model)):
            out = runs / f"{suite}_{name}"
            asked = ["--suite", suite, *words, *HOW, "--model", model, "--out", out]
            run("-m", "glm_training.cli.main", "evaluate", *asked)
            told = json.loads((out / "results.json").read_text())
            report[suite] |= {"judge": told["judge"], name: [shortened(figure) for figure in told["figures"]]}
            lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
            scores[name] = [float(line["correct"] if suite == "geneval" else line["score"]) for line in lines]
        report[suite]["change"] = change(scores["before"], scores["after"], 4 if suite == "geneval" else 1)
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n")


def change(before: list[float], after: list[float], samples: int) -> dict[str, float]:
    """Of the mean score of a picture, prompt by prompt, whose `samples` pictures lie one after another."""
    gains = [a - b for b, a in zip(before, after, strict=True)]
    prompts = [statistics.fmean(gains[start : start + samples]) for start in range(0, len(gains), samples)]
    error = statistics.stdev(prompts) / len(prompts) ** 0.5
    mean = statistics.fmean(prompts)
    return {"mean": round(mean, 4), "standard_error": round(error, 4), "standard_errors": round(mean / error, 2)}


def shortened(figure: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a figure of results.json."""
    kept = {key: figure[key] for key in ("name", "value", "error", "count", "of")}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def run(*words: object) -> None:
    """A command of this Python, in the root."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
