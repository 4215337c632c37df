"""How much of what two experts have gained is left when they are merged into one model by on-policy distillation?

    python -m benchmarks.merging --out benchmarks/results/merging.json

The prompts of a data folder are two tasks: signs, with a quoted word, and scenes, without one. An expert of each is
trained with rewards from the same model, the signs' in its DiT half, the scenes' in its AR half (`TASKS`), and one
student learns both halves from both (configs/recipes/opd.yaml), each teacher answering for the training prompts of its
task. The base model, the experts and the student are scored on the held-out prompts of both tasks by the task's metric,
at the same random numbers. What a task keeps is (student - base) / (its expert - base); the bar is 0.9.
Standard errors are over prompts. "averaged" is the plain mean of the experts' weights, the cheapest way to merge.
Finished runs are kept, so that it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quickstart import machine

ROOT = Path(__file__).parents[1]
TASKS = {"signs": "text_accuracy", "scenes": "objects"}
"""Task -> the metric that it is rewarded and scored by."""
EXPERTS = {
    "signs": ["benchmarks/methods/words.yaml", "configs/recipes/nft.yaml"],
    "scenes": ["benchmarks/methods/objects.yaml", "configs/recipes/grpo.yaml"],
}
BOTH_HALVES = "benchmarks/methods/credit.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/t2i"), help="with prompts.txt, target_images, held_out")
    parser.add_argument("--expert-steps", type=int, default=40)
    parser.add_argument("--student-steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=4, help="images per held-out prompt")
    parser.add_argument("--runs", type=Path, default=Path("runs/merging"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="of every run")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "seeds": args.seeds}
    report["per_seed"] = [one_seed(args, seed) for seed in args.seeds]
    for arm in ("merged", "averaged"):
        report[arm] = {
            task: round(statistics.fmean(row[arm][task]["kept"] for row in report["per_seed"]), 3) for task in TASKS
        }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of base, experts, average and student on both tasks, and what was kept."""
    folder = ROOT / args.runs / str(seed)
    data = write_tasks(ROOT / args.data, folder / "data")
    common = [f"seed={seed}", "logging.save_interval=1000000", "evaluation.enabled=false"]
    models: dict[str, str | None] = {"base": None}
    for task, metric in TASKS.items():
        keys = [*reads(data[task]), f"reward.metrics={{{metric}: 1.0}}", f"training.max_steps={args.expert_steps}"]
        models[task] = run(EXPERTS[task], folder / f"expert-{task}", [*common, *keys, *args.overrides])
    teachers = ", ".join(f"{task}: {{model: {models[task]}, prompts_file: {data[task] / 'all.txt'}}}" for task in TASKS)
    keys = [*reads(data["both"]), f"training.max_steps={args.student_steps}", "training.batch_size=24"]
    keys += [f"opd.teachers={{{teachers}}}"]
    models["merged"] = run(
        [BOTH_HALVES, "configs/recipes/opd.yaml"], folder / "student", [*common, *keys, *args.overrides]
    )
    models["averaged"] = average([str(models[task]) for task in TASKS], folder / "averaged")
    scores = {
        name: {task: score(args, folder / f"score-{name}-{task}", model, data, task, seed) for task in TASKS}
        for name, model in models.items()
    }
    result: dict[str, Any] = {
        "scores": {name: {t: statistics.fmean(s) for t, s in row.items()} for name, row in scores.items()}
    }
    for arm in ("merged", "averaged"):
        result[arm] = {task: kept(scores["base"][task], scores[task][task], scores[arm][task]) for task in TASKS}
    return result


def kept(base: list[float], expert: list[float], merged: list[float]) -> dict[str, float]:
    """The share of an expert's gain that is left, and the standard errors over prompts of both gains."""
    gains = [[b - a for a, b in zip(base, after, strict=True)] for after in (expert, merged)]
    errors = [statistics.stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else 0.0 for gain in gains]
    whole, left = (statistics.fmean(gain) for gain in gains)
    names = ("expert_gain", "gain", "expert_standard_error", "standard_error")
    return {
        **{name: round(value, 4) for name, value in zip(names, (whole, left, *errors), strict=True)},
        "kept": round(left / whole, 3) if whole else 0.0,
    }


def write_tasks(data: Path, folder: Path) -> dict[str, Path]:
    """Folders of each task and of both: train.jsonl, held_out.jsonl, their targets, and all.txt with the training
    prompts."""
    folders = {}
    for task in (*TASKS, "both"):
        folders[task] = folder / task
        folders[task].mkdir(parents=True, exist_ok=True)
        for name, source in (("train", data), ("held_out", data / "held_out")):
            lines = (source / "prompts.txt").read_text(encoding="utf-8").splitlines()
            chosen = [(i, line) for i, line in enumerate(lines) if task == "both" or ('"' in line) == (task == "signs")]
            records = [{"prompt": line, "target": f"{name}-{i}.png"} for i, line in chosen]
            for i, _ in chosen:
                shutil.copyfile(source / "target_images" / f"{i}.png", folders[task] / f"{name}-{i}.png")
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folders[task] / f"{name}.jsonl").write_text(text, encoding="utf-8")
            if name == "train":
                (folders[task] / "all.txt").write_text("\n".join(line for _, line in chosen) + "\n", encoding="utf-8")
    return folders


def reads(folder: Path) -> list[str]:
    """The keys of a run on a task's training prompts."""
    return [f"data.metadata_file={folder / 'train.jsonl'}", "data.target_images_dir=null"]


def run(configs: list[str], folder: Path, overrides: list[str]) -> str:
    """Trains unless that was finished; the checkpoint's folder."""
    if not (folder / "done").is_file():
        files = [word for config in configs for word in ("--config", config)]
        command = [sys.executable, "train.py", *files, f"output_dir={folder}", "--overwrite", *overrides]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        (folder / "done").touch()
    return str(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip())


def average(models: list[str], folder: Path) -> str:
    """A pipeline whose weights are the mean of those of several checkpoints."""
    if not (folder / "done").is_file():
        first, *others = (Path(model) / "pipeline" for model in models)
        subprocess.run(["cp", "-r", "-L", str(first), str(folder)], check=True)
        for file in folder.rglob("*.safetensors"):
            tensors = [load_file(root / file.relative_to(folder)) for root in (first, *others)]
            mean = {
                name: value
                if not value.is_floating_point()
                else torch.stack([each[name].float() for each in tensors]).mean(0).to(value.dtype)
                for name, value in tensors[0].items()
            }
            save_file(mean, file, metadata={"format": "pt"})
        (folder / "done").touch()
    return str(folder)


def score(
    args: argparse.Namespace, folder: Path, model: str | None, data: dict[str, Path], task: str, seed: int
) -> list[float]:
    """Means of the task's metric over the samples of each of its held-out prompts, by a run that learns nothing."""
    keys = [*reads(data[task]), f"reward.metrics={{{TASKS[task]}: 1.0}}", f"seed={seed}"]
    keys += ["training.max_steps=1", "training.learning_rate=1e-12", "evaluation.enabled=true"]
    keys += [f"evaluation.eval_prompts_file={data[task] / 'held_out.jsonl'}", "evaluation.num_eval_samples=1000"]
    keys += [f"evaluation.samples_per_prompt={args.samples}", *([] if model is None else [f"model.name={model}"])]
    run([BOTH_HALVES], folder, [*keys, *args.overrides])
    first = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])
    return [value for value in first["scores"][TASKS[task]] if value is not None]


if __name__ == "__main__":
    main()
