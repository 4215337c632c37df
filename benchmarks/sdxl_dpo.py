"""A step of SDXL DPO with a LoRA: this package against a plain loop, on one model and the same pairs in one run.

    python -m benchmarks.sdxl_dpo --out benchmarks/results/sdxl_dpo.json

Two baselines, both of which decode, VAE-encode and text-encode their batch at every step. `plain` asks a second, frozen
UNet for the reference; `adapter_off` asks the same UNet with its adapters off. Both send the pairs through a UNet in
one forward pass. Ours is `DPOTrainer` as a configuration starts it: everything is encoded once, and the reference is
the UNet with its adapters off. Pairs, batch, adapters, optimizer, gradient checkpointing and images per pass of the VAE
are alike. The files are JPEGs of 1024 px, as in pickapic_v2, decoded in the loop's own thread;
`speedup_without_decoding` leaves that out, for loops with threads to spare. The arms take turns and medians are
compared, so that other load on the machine meets all. The peak counts what each adds to a process that has just loaded
the model, before adapters, reference, optimizer or cache: ours with the encoding before the first step; `ours_cached`
in a run that finds everything encoded by an earlier one. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.memory import peak_resident, reset_peak
from glm_training.algorithms.preference import diffusion_dpo_loss
from glm_training.config import Config, load_config
from glm_training.data.preference.dataset import PreferenceDataset
from glm_training.data.preference.scan import load_pairs
from glm_training.models.lora import adapters_disabled, add_lora
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.types import SDXLText, add_time_ids
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world

LEARNING_RATE, BETA, RANK = 1e-5, 5000.0, 8
ARMS = ("ours", "plain", "adapter_off")
CACHED = "ours_cached"
Step = Callable[[], None]


@dataclass(frozen=True)
class Options:
    model: str
    pairs: int
    batch_size: int
    size: int
    file_size: int
    repeats: int
    steps: int
    checkpointing: bool
    dtype: str


def main() -> None:
    options, out = read_options()
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs", options)
        arms = {name: build(name, Path(folder), options) for name in ARMS}
        steps = {name: arm.start() for name, arm in arms.items()}
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.repeats):
            for name, step in steps.items():
                seconds[name].append(timed(step))
        memory = {name: peak_memory(name, Path(folder), options) for name in (*ARMS, CACHED)}
    decoding = {name: statistics.median(arm.decode_seconds) for name, arm in arms.items() if isinstance(arm, Plain)}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "benchmark": "sdxl_dpo",
        **asdict(options),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "median_step_seconds": {name: round(value, 4) for name, value in medians.items()},
        "all_step_seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
        "speedup": {name: round(medians[name] / medians["ours"], 2) for name in decoding},
        "decoding_seconds": {name: round(value, 4) for name, value in decoding.items()},
        "speedup_without_decoding": {
            name: round((medians[name] - value) / medians["ours"], 2) for name, value in decoding.items()
        },
        "peak_memory_added_mib": {name: round(value, 1) for name, value in memory.items()},
        "memory_ratio": {name: round(memory["ours"] / memory[name], 3) for name in decoding},
        "memory_ratio_cached": {name: round(memory[CACHED] / memory[name], 3) for name in decoding},
    }
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


def read_options() -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-random", help="tiny-random, an SDXL folder or a hub id")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs per step")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--file-size", type=int, default=1024, help="pixels of a side of the files")
    parser.add_argument("--repeats", type=int, default=21, help="steps of each that are timed")
    parser.add_argument("--steps", type=int, default=3, help="steps in which the peak of memory is taken")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="also write the report there")
    values = vars(parser.parse_args())
    out = values.pop("out")
    return Options(**values), out


def write_pairs(folder: Path, options: Options) -> None:
    """JPEGs of blurred noise."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(options.pairs):
        for role in ("preferred", "rejected"):
            small = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8))
            small.resize((options.file_size, options.file_size)).save(folder / "images" / f"{i}_{role}.jpg", quality=90)
        paths = {role: f"images/{i}_{role}.jpg" for role in ("preferred", "rejected")}
        lines.append({"prompt": f"a photo of the red circle, number {i}"} | paths)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def config_of(folder: Path, options: Options, cache: Path | None = None) -> Config:
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"family": "sdxl", "name": options.model, "torch_dtype": options.dtype},
        "data": {
            "pairs": str(folder / "pairs"),
            "image_size": {"height": options.size, "width": options.size},
            "num_workers": 0,
        },
        "training": {
            "method": "dpo",
            "batch_size": options.batch_size,
            "gradient_accumulation_steps": 1,
            "max_steps": 1000,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "gradient_checkpointing": options.checkpointing,
            "mixed_precision": "no",
        },
        "dpo": {"beta": BETA, "vae_batch_size": 1, "cache_dir": str(cache or folder / "run/cache")},
        "lora": {"enabled": True, "rank": RANK, "alpha": float(RANK)},
    }
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path)


class Ours:
    """The trainer, around a model that is loaded already."""

    def __init__(self, folder: Path, options: Options, cache: Path | None = None) -> None:
        self.config = config_of(folder, options, cache)
        self.world = init_world(True, None)
        self.family = load_model(self.config, options)

    def start(self) -> Step:
        """Builds the trainer, encodes everything, and hands over the step."""
        with mock.patch.object(SDXL, "load", return_value=self.family):
            trainer = build_trainer(self.config, self.world)
        trainer.prepare()
        return lambda: void(trainer.training_step())


def load_model(config: Config, options: Options) -> SDXL:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SDXL.load(options.model, dtype=getattr(torch, options.dtype), device=device, seed=config.seed)


def build(name: str, folder: Path, options: Options, cache: Path | None = None) -> Ours | Plain:
    """An arm with its model loaded, and nothing else; ours with the cache of an earlier run, if one is given."""
    if name.startswith("ours"):
        return Ours(folder, options, cache)
    return Plain(folder, options, second=name == "plain")


class Plain:
    """The plain loop, with a `second` UNet or not. `decode_seconds`: what each step spent on reading and decoding."""

    def __init__(self, folder: Path, options: Options, *, second: bool) -> None:
        self.options, self.folder, self.second = options, folder, second
        self.decode_seconds: list[float] = []
        self.config = config_of(folder, options)
        self.family = load_model(self.config, options)

    def start(self) -> Step:
        """Copies the reference, and hands over the step."""
        options, unet = self.options, self.family.unet
        pairs = load_pairs(self.folder / "pairs").pairs
        self.dataset = PreferenceDataset(pairs, height=options.size, width=options.size)
        if options.checkpointing:
            unet.enable_gradient_checkpointing()
        self.reference = unet.sharing(copy.deepcopy(unet.unet)) if self.second else unet
        add_lora(unet.unet, unet.lora_targets, RANK, RANK)
        self.family.set_trainable(unet=True)
        self.family.train()
        self.params = list(self.family.trainable("unet").values())
        self.optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE)
        self.schedule = NoiseSchedule(unet.scheduler)
        self.next = 0
        return self.step

    def step(self) -> None:
        options, unet = self.options, self.family.unet
        rows = [(self.next + i) % len(self.dataset) for i in range(options.batch_size)]
        self.next += options.batch_size
        started = time.perf_counter()
        batch = self.dataset.batch(rows)
        self.decode_seconds.append(time.perf_counter() - started)
        images = batch.images
        clean = unet.encode_images(images.pixels, micro_batch_size=self.config.dpo.vae_batch_size)
        text = unet.encode_prompts(batch.prompts)
        text = SDXLText.cat([text, text])
        size = (options.size, options.size)
        ids = add_time_ids(images.original_sizes, images.crops, size, rows=len(clean)).to(clean.device)
        times = torch.randint(0, self.schedule.length, (len(rows),), device=clean.device).repeat(2)
        signal, spread = (level.view(-1, 1, 1, 1) for level in self.schedule.coefficients(times))
        noise = torch.randn(len(rows), *clean.shape[1:], device=clean.device).repeat(2, 1, 1, 1)
        noisy = signal * clean + spread * noise
        with torch.no_grad(), nullcontext() if self.second else adapters_disabled(unet.unet):
            before = (self.reference(noisy, times, text, ids) - noise).square().flatten(1).mean(1)
        errors = (unet(noisy, times, text, ids) - noise).square().flatten(1).mean(1)
        diffusion_dpo_loss(*errors.chunk(2), *before.chunk(2), beta=BETA).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def void(_: object) -> None:
    """Nothing: a step has no result."""


def timed(step: Step) -> float:
    """Seconds one step takes, the device's queue emptied."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(name: str, folder: Path, options: Options) -> float:
    """MiB that all steps add, at their peak, to a process of its own that has loaded the model: resident on CPU,
    allocated on CUDA. `ours` starts with an empty cache, `ours_cached` with that of the timed steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_memory, (name, folder, options))


def _added_memory(name: str, folder: Path, options: Options) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        (Path(own) / "pairs").symlink_to(folder / "pairs")
        arm = build(name, Path(own), options, folder / "run/cache" if name == CACHED else None)
        gc.collect()
        reset_peak()
        on_cuda = torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if on_cuda else peak_resident()
        step = arm.start()
        for _ in range(options.steps):
            step()
        after = torch.cuda.max_memory_allocated() if on_cuda else peak_resident()
    return (after - before) / 2**20


if __name__ == "__main__":
    main()
