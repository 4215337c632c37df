"""The tiny models on a GPU: precision, where ratios start, memory and rates. Minutes, no network.

    python benchmarks/gpu/tiny.py --out FOLDER [--device cuda]

Each result goes into FOLDER/tiny.json as soon as it is there, so a run that is cut off leaves what it measured:

- `fp32_against_cpu`: the largest difference of the logged losses of two steps between the device and the CPU, from the
  same seeds (noise is drawn on the CPU);
- `ratios`: for fp32, bf16 and fp16, with `rollout.rescore` on and off: how far the recorded log-probs are from those of
  the training passes, and what the clip cuts in the first update, where nothing has been learned yet;
- `steps`: seconds of a GRPO step, images and AR tokens per second, peak memory, for each precision;
- `others`: two steps of supervised finetuning, DPO and DMDR in fp32, bf16 and fp16 (with loss scaling).

Runs with the libraries that are there, older than those of pyproject.toml included: what fails is written down as the
error it gave.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

BASE = [
    "evaluation.enabled=false",
    "logging.log_images=false",
    "logging.use_tensorboard=false",
    "logging.save_interval=100000",
    "logging.log_interval=1",
]
GRPO = [
    *BASE,
    "reward.metrics={structure: 1.0}",
    "reward.grpo.dit.method=flow_grpo",
    "reward.grpo.dit.timesteps_per_sample=null",
    "reward.grpo.ar.updates_per_rollout=1",
    "reward.grpo.ar.clip_range=1e-4",
    "reward.grpo.dit.clip_range=1e-5",
    "reward.grpo.gate=false",
    "training.batch_size=4",
]
OTHERS = {
    "sft": ("configs/quickstart.yaml", ["training.use_reward=false"]),
    "dpo sdxl": ("configs/sdxl_dpo_lora_tiny.yaml", []),
    "dpo glm": ("configs/glm_dpo_tiny.yaml", []),
    "dmdr sdxl": ("configs/sdxl_dmdr_cold_start_tiny.yaml", ["model.torch_dtype=float32"]),
}
MEASURED = ("ratio", "replay_gap", "clip_fraction", "loss", "kl")


def settings(device: str, precision: str) -> list[str]:
    return [f"model.device_map={device}", f"training.mixed_precision={precision}"]


def metrics(config: str, overrides: list[str]) -> list[dict[str, float]]:
    """The logged lines of a run in a folder that is gone afterwards."""
    from glm_training.config import load_config
    from glm_training.trainers.run import run_training

    with tempfile.TemporaryDirectory() as folder:
        run_training(load_config(ROOT / config, [*overrides, f"output_dir={folder}/run"]))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def environment(device: str) -> dict[str, Any]:
    import diffusers
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, diffusers)}
    return {"device": name, **versions}


def fp32_against_cpu(device: str) -> dict[str, Any]:
    options = [*GRPO, "training.max_steps=2", "training.batch_size=1"]
    there, here = (metrics("configs/quickstart.yaml", [*options, *settings(d, "no")]) for d in (device, "cpu"))
    found: dict[str, Any] = {}
    for one, other in zip(there, here, strict=True):
        for key in sorted(one.keys() & other.keys()):
            if key.split("/")[0] in ("ar", "dit", "reward"):
                found[f"step {one['step']:g} {key}"] = {device: one[key], "cpu": other[key]}
    return found


def ratios(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision in ("no", "bf16", "fp16"):
        for rescore in ("true", "false"):
            options = [*GRPO, "training.max_steps=1", f"rollout.rescore={rescore}", *settings(device, precision)]
            row = metrics("configs/quickstart.yaml", options)[0]
            kept = {k: v for k, v in row.items() if any(word in k for word in MEASURED)}
            found[f"{precision}, rescore {rescore}"] = kept
    return found


def steps(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision in ("no", "bf16", "fp16"):
        rows = metrics("configs/quickstart.yaml", [*GRPO, "training.max_steps=6", *settings(device, precision)])[2:]
        names = [k for k in rows[-1] if k.startswith(("time/", "memory/", "images", "tokens", "ar/tokens", "rollout"))]
        found[precision] = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return found


def others(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (config, own) in OTHERS.items():
        for precision in ("no", "bf16", "fp16"):
            options = [*BASE, *own, "training.max_steps=4", *settings(device, precision)]
            try:
                rows = metrics(config, options)
            except Exception as error:  # what fails on this machine is a result
                found[f"{name}, {precision}"] = {"error": repr(error)[:600]}
                continue
            kept = {k: [row.get(k) for row in rows] for k in rows[-1] if "loss" in k or "skip" in k or "memory" in k}
            found[f"{name}, {precision}"] = kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[str], dict[str, Any]]] = {
        "environment": environment,
        "ratios": ratios,
        "steps": steps,
        "others": others,
        "fp32_against_cpu": fp32_against_cpu,
    }
    report: dict[str, Any] = {}
    for name, measure in parts.items():
        started = time.perf_counter()
        try:
            report[name] = measure(arguments.device)
        except Exception:  # the other parts are wanted all the same
            report[name] = {"error": traceback.format_exc()[-3000:]}
        report[f"{name} took"] = round(time.perf_counter() - started, 1)
        (arguments.out / "tiny.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
