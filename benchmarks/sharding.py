"""Memory, step time and bytes sent of full finetuning on several processes: whole copies (DDP) against shards (FSDP2).

    python -m benchmarks.sharding --hidden 512 --layers 24 --out benchmarks/results/scaling.json
    python -m benchmarks.sharding --hidden 1024 --layers 24 --steps 3 --arms ddp-2 fsdp-4 \
        --out benchmarks/results/sharding.json
    python -m benchmarks.sharding --hidden 1024 --layers 12 --steps 2 --arms draw-half draw-block \
        --out benchmarks/results/gathering.json

Supervised training of the AR half of a random GLM-Image, AdamW, fp32, the same four pictures a step whatever the number
of processes. In the arms that draw a step is a rollout instead, two plans on each of four processes, and its "loss" the
mean log-prob of their tokens. Each arm is a run of its own over gloo. Memory: the largest resident size of a process
from before the model was built to the end, less what it held then; private: the same without pages of mapped files,
which processes share and the system drops where room is short. Bytes: what all processes of an arm send in a step by
their TCP connections. processor_seconds_per_step: what all of them compute and send in a step; seconds depend on what
else the machine does. collectives: the calls that move weights and gradients in a step of one process, and the whole
tensors in them, from one further step. Prints JSON; exits with 1 where the losses of two arms differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.memory import PrivatePeak, peak_resident, reset_peak
from benchmarks.quickstart import machine
from benchmarks.wire import Collectives, bytes_sent

ROOT = Path(__file__).parents[1]
PICTURES = 4
SAME = 1e-4
"""Losses of some units, summed in another order in fp32."""
ARMS = {
    "alone": (1, "ddp", None),
    "ddp-2": (2, "ddp", None),
    "fsdp-2": (2, "fsdp", None),
    "ddp-4": (4, "ddp", None),
    "fsdp-4": (4, "fsdp", None),
    "hsdp-2x2": (4, "fsdp", 2),
    "draw-half": (4, "fsdp", None),
    "draw-block": (4, "fsdp", None),
}
"""Name -> processes, strategy, shard size. Those that draw gather shards as the end of their name says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=[name for name in ARMS if not name.startswith("draw-")]
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker[0]), args.steps, args.worker[1:])
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trained = write_model(folder / "model", args.hidden, args.layers)
        write_data(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(tree(folder)), encoding="utf-8")
        report: dict[str, Any] = {"machine": machine(), "trained_parameters": trained, "pictures_per_step": PICTURES}
        for name in args.arms:
            report[name] = run_arm(folder, args.steps, name)
    if {"ddp-2", "fsdp-4"} <= set(args.arms):
        for kind in ("memory", "private"):
            report[f"{kind}_fsdp_4_to_ddp_2"] = round(report["fsdp-4"][kind] / report["ddp-2"][kind], 3)
    losses = [report[name]["loss"] for name in args.arms]
    report["largest_difference_of_losses"] = max(max(each) - min(each) for each in zip(*losses, strict=True))
    text = json.dumps(report, indent=1) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    sys.exit(int(report["largest_difference_of_losses"] > SAME))


def write_model(folder: Path, hidden: int, layers: int) -> int:
    """A random GLM-Image whose AR half is that large; how many parameters of it are trained."""
    from dataclasses import replace

    from glm_training.models.glm_image.tiny import RANDOM_SHAPE, build_tiny

    pipeline: Any = build_tiny(replace(RANDOM_SHAPE, ar_hidden=hidden, ar_layers=layers))
    pipeline.save_pretrained(folder)
    return sum(p.numel() for p in pipeline.vision_language_encoder.model.language_model.parameters())


def write_data(folder: Path) -> None:
    """Eight captioned pictures of noise."""
    import numpy as np
    from PIL import Image

    (folder / "pictures").mkdir()
    numbers = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(numbers.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"pictures/{index}.png")
        (folder / f"pictures/{index}.txt").write_text(f"picture number {index}\n")


def run_arm(folder: Path, steps: int, name: str) -> dict[str, Any]:
    """A run of several processes: the largest memory of one, seconds and bytes of a step."""
    processes, strategy, shard_size = ARMS[name]
    port = str(20000 + os.getpid() % 20000 + processes)
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    size = "null" if shard_size is None else str(shard_size)
    keys = [f"distributed.strategy={strategy}", f"distributed.shard_size={size}"]
    if name.startswith("draw-"):
        keys += [f"distributed.gather={name.removeprefix('draw-')}"]
    command = [sys.executable, "-m", "benchmarks.sharding", "--steps", str(steps), "--worker", str(folder), *keys]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = []
    for process in started:
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(output)
        told.append(json.loads(output.splitlines()[-1]))
    return {
        "processes": processes,
        "memory": max(each["memory"] for each in told),
        "private": max(each["private"] for each in told),
        "seconds_per_step": told[0]["seconds"],
        "processor_seconds_per_step": round(sum(each["processor"] for each in told), 3),
        "bytes_per_step": sum(each["bytes"] for each in told),
        "collectives": told[0]["collectives"],
        "loss": told[0]["loss"],
    }


def work(folder: Path, steps: int, overrides: list[str]) -> None:
    """One process of an arm; a JSON line at the end."""
    from glm_training.config import load_config
    from glm_training.trainers.run import build_trainer
    from glm_training.utils.distributed import barrier, init_world, shutdown

    world = init_world(True, "gloo")
    overrides = [*overrides, f"training.batch_size={PICTURES // world.world_size}"]
    config = load_config(folder / "run.yaml", overrides)
    draws = config.distributed.gather != "auto"
    reset_peak()
    before, private = peak_resident(), PrivatePeak()
    trainer: Any = build_trainer(config, world)
    trainer.prepare()
    seconds, processor, sent, losses = [], [], [], []
    for _ in range(steps):
        barrier(world)
        started, computed, sent_before = time.perf_counter(), time.process_time(), bytes_sent()
        losses.append(drawn(trainer) if draws else trainer.training_step()["ar/loss"])
        trainer.step += 1
        processor.append(time.process_time() - computed)
        sent.append(bytes_sent() - sent_before)
        barrier(world)
        seconds.append(time.perf_counter() - started)
    memory, alone = peak_resident() - before, private.beyond()
    with Collectives() as collectives:
        drawn(trainer) if draws else trainer.training_step()
    found = {
        "memory": memory,
        "private": alone,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "processor": statistics.median(processor[1:]),
        "bytes": int(statistics.median(sent[1:])),
        "collectives": collectives.told(),
        "loss": [round(float(loss), 5) for loss in losses],
    }
    barrier(world)
    shutdown(world)
    sys.stdout.write(json.dumps(found) + "\n")


def drawn(trainer: Any) -> float:
    """The mean log-prob of two plans of an edit, without a preview, that a process writes."""
    import torch

    prompt = trainer.family.ar.encode_prompts(["a picture"], 64, 64, torch.zeros(1, 3, 64, 64))
    uniforms = torch.rand(2, prompt.T, generator=torch.Generator().manual_seed(trainer.world.rank))
    return float(trainer.family.ar.rollout(prompt, 2, uniforms, temperature=1.0, top_p=1.0).log_probs.mean())


def tree(folder: Path) -> dict[str, Any]:
    """The configuration of all arms."""
    return {
        "seed": 1,
        "output_dir": str(folder / "run"),
        "model": {"name": str(folder / "model"), "component": "ar", "torch_dtype": "float32"},
        "data": {
            "images": str(folder / "pictures"),
            "image_size": {"height": 64, "width": 64},
            "num_workers": 0,
            "validation": 0,
        },
        "training": {
            "use_reward": False,
            "gradient_accumulation_steps": 1,
            "max_steps": 100,
            "learning_rate": 1e-4,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "logging": {"log_images": False, "use_tensorboard": False},
        "evaluation": {"enabled": False},
    }


if __name__ == "__main__":
    main()
