"""Tokens plus their log-probs for a group of plans: this package against the stock path, on one model in one run.

    python -m benchmarks.rollout

The stock path is what a trainer built on `generate` does: the prompt repeated once per sample, `generate` (kept to the
codebook, as it would otherwise end early or leave it), then a teacher-forced `forward` for the log-probs. Its log-probs
even belong to other positions than those it sampled at; only its time and memory count here. The two take turns and
medians are compared, so that other load on the machine meets both. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, GlmImageForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from benchmarks.memory import peak_resident, reset_peak
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.tiny import TINY_FOLDER, TinyShape, build_tiny

PROMPT = "a red circle above a blue square, next to a sign that says hello"


@dataclass(frozen=True)
class Options:
    model: str
    group: int
    height: int
    width: int
    repeats: int
    temperature: float
    top_p: float
    device: str
    dtype: torch.dtype


class CodebookOnly(LogitsProcessor):
    """Keeps the stock `generate` inside the codebook."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.num_codes :] = -torch.inf
        return scores


def main() -> None:
    options = read_options()
    ar = load(options)
    paths = {"ours": lambda: ours(ar, options), "stock": lambda: stock(ar, options)}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for path in paths.values():
        path()
    for _ in range(options.repeats):
        for name, path in paths.items():
            seconds[name].append(timed(path, options.device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    prompt = ar.encode_prompts([PROMPT], options.height, options.width)
    report = {
        "benchmark": "rollout",
        "model": options.model,
        "device": options.device,
        "dtype": str(options.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "group": options.group,
        "tokens_per_sample": prompt.T,
        "prompt_tokens": prompt.input_ids.shape[1],
        "temperature": options.temperature,
        "top_p": options.top_p,
        "repeats": options.repeats,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "all_seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
        "tokens_per_second": {name: round(options.group * prompt.T / value) for name, value in medians.items()},
        "speedup": round(medians["stock"] / medians["ours"], 2),
        "peak_memory_mib": {name: round(peak_memory(name, options), 1) for name in paths},
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def read_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, tiny-random, or a GLM-Image folder")
    parser.add_argument("--group", type=int, default=16, help="plans of the one prompt")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    values = parser.parse_args()
    values.dtype = torch.float32 if values.dtype == "float32" else torch.bfloat16
    return Options(**vars(values))


def load(options: Options) -> ARComponent:
    """`tiny-random` has the trained tiny model's sizes, with random weights."""
    if options.model == "tiny-random":
        pipeline: Any = build_tiny(TinyShape())
        model, processor = pipeline.vision_language_encoder, pipeline.processor
    else:
        folder = TINY_FOLDER if options.model == "tiny" else Path(options.model)
        model = GlmImageForConditionalGeneration.from_pretrained(folder / "vision_language_encoder")
        processor = AutoProcessor.from_pretrained(folder / "processor")
    return ARComponent(model.to(options.device, options.dtype).eval(), processor)


def ours(ar: ARComponent, options: Options) -> Tensor:
    """Log-probs [B, T] of one group; they come with the tokens."""
    prompt = ar.encode_prompts([PROMPT], options.height, options.width)
    uniforms = torch.rand(options.group, prompt.T, generator=torch.Generator().manual_seed(0))
    rollout = ar.rollout(prompt, options.group, uniforms, temperature=options.temperature, top_p=options.top_p)
    return rollout.log_probs


@torch.no_grad()
def stock(ar: ARComponent, options: Options) -> Tensor:
    """Log-probs [B, T] of one group by `generate` on repeated inputs and a forward over the result."""
    conversation = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    model: Any = ar.model
    processor: Any = ar.processor
    inputs = processor.apply_chat_template(
        [conversation] * options.group,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "target_h": options.height, "target_w": options.width},
    ).to(options.device)
    length = inputs["input_ids"].shape[1]
    total = sum(rows * columns for rows, columns in ar.grids(options.height, options.width, "t2i"))
    sequences = model.generate(
        **inputs,
        max_new_tokens=total,
        do_sample=True,
        temperature=options.temperature,
        top_p=options.top_p,
        logits_processor=LogitsProcessorList([CodebookOnly(ar.num_codes)]),
    )
    mask = torch.ones_like(sequences)
    logits = model(
        input_ids=sequences,
        attention_mask=mask,
        image_grid_thw=inputs["image_grid_thw"],
        images_per_sample=inputs["images_per_sample"],
    ).logits[:, length - 1 : -1, : ar.num_codes]
    scaled = logits.float() / options.temperature
    return scaled.log_softmax(-1).gather(-1, sequences[:, length:, None]).squeeze(-1)


def timed(path: Callable[[], Tensor], device: str) -> float:
    """Seconds one call takes, the device's queue emptied."""
    start = time.perf_counter()
    path()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(name: str, options: Options) -> float:
    """MiB one call adds, at its peak, to a process of its own that has loaded the model: resident on CPU, allocated on
    CUDA. Resident memory that loading freed is used again before it grows, and not counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_memory, (name, options))


def _added_memory(name: str, options: Options) -> float:
    ar = load(options)
    on_cuda = options.device.startswith("cuda")
    gc.collect()
    reset_peak()
    before = torch.cuda.memory_allocated() if on_cuda else peak_resident()
    {"ours": ours, "stock": stock}[name](ar, options)
    after = torch.cuda.max_memory_allocated() if on_cuda else peak_resident()
    return (after - before) / 2**20


if __name__ == "__main__":
    main()
