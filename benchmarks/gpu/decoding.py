"""Milliseconds per token of the AR half: our loop from the host, as a CUDA graph, and stock `generate`, beside the time
that reading the weights once takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from benchmarks.rollout import CodebookOnly
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.decode import write_tokens
from glm_training.models.glm_image.decode_graph import Stepper
from glm_training.models.glm_image.positions import decode_positions, prompt_positions
from glm_training.models.glm_image.token_sampling import TokenSampler

SAMPLING = {"temperature": 0.9, "top_p": 0.75}
GOAL_FLOOR, GOAL_STOCK = 1.5, 4.0
"""At 16 samples: at most so many times the floor, at least so many times faster than stock."""


def measure(add: Callable[..., None], device: str, small: bool) -> None:
    """For each batch the three ways to decode; a way that fails is written down as its error."""
    model, grid = _model(device, small), (4, 4) if small else (16, 16)
    floor = _floor(model, device)
    add(floor=floor)
    for rows in (1, 2) if small else (1, 16, 64):
        prompt = _prompt(model, grid, 16 if small else 64)
        told: dict[str, Any] = {}
        for name, mode in (("plain", False), ("graph", "auto")):
            told[name] = _tried(_ours, model, prompt, rows, mode, device)
            add(**{f"batch {rows}": told})
        told["stock"] = _tried(_stock, model, prompt, rows, (2, 6) if small else (8, 40), device)
        best = told["graph"].get("ms_per_token") or told["plain"].get("ms_per_token")
        if best:
            told["times_the_floor"] = round(best / floor["ms"], 2)
        if best and "ms_per_token" in told["stock"]:
            told["times_faster_than_stock"] = round(told["stock"]["ms_per_token"] / best, 2)
        add(**{f"batch {rows}": told}, goal={"times_the_floor": GOAL_FLOOR, "times_faster_than_stock": GOAL_STOCK})


def _model(device: str, small: bool) -> Any:
    if small:
        from glm_training.models.glm_image.tiny import build_tiny

        pipeline: Any = build_tiny()
        return pipeline.vision_language_encoder.to(device)
    from benchmarks.gpu.full import random_ar

    return random_ar(device)


def _floor(model: Any, device: str) -> dict[str, float]:
    """Bytes of the weights that each step reads, the rate at which a copy reads and writes, and what follows."""
    parts: tuple[nn.Module, ...] = (model.model.language_model.layers, model.lm_head)
    size = sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())
    words = 2**22 if device == "cpu" else 2**30
    source = torch.ones(words, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    rate = 2 * words * 2 / seconds
    return {"bytes": size, "bytes_per_second": rate, "ms": size / rate * 1e3}


def _prompt(model: Any, grid: tuple[int, int], length: int) -> ARPrompt:
    """One prompt of random words, unpadded."""
    text = model.config.text_config
    first = text.vision_vocab_size  # words come after the image's ids; the last ids are special
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(first, text.vocab_size - 64, (1, length), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    positions, start = prompt_positions(ids, mask, model.config.image_start_token_id, None)
    return ARPrompt(ids, mask, positions, decode_positions(start, (grid,)), (grid,), 0)


def _ours(model: Any, prompt: ARPrompt, rows: int, mode: Any, device: str) -> dict[str, Any]:
    """From step to step, the reading of the prompt and the recording left out."""
    stepper, marks = Stepper(mode), list[float]()

    def mark(step: int) -> None:
        if step in (4, prompt.T - 1):  # the graph is there from the third on
            _synchronised(device)
            marks.append(time.perf_counter())

    draws = torch.rand(rows, prompt.T, generator=torch.Generator().manual_seed(1)).to(device)
    _reset_peak(device)
    sampler = TokenSampler(draws, model.model.vqmodel.config.num_embeddings, do_sample=True, **SAMPLING)
    write_tokens(model, prompt, rows, sampler, mark, stepper.steps)
    tokens: Tensor = sampler.result()[0]
    told = {"ms_per_token": (marks[1] - marks[0]) / (prompt.T - 5) * 1e3, "peak_bytes": _peak(device)}
    return {**told, "checksum": int(tokens.sum()), "refused": stepper.refusals}


def _stock(model: Any, prompt: ARPrompt, rows: int, lengths: tuple[int, int], device: str) -> dict[str, Any]:
    """`generate`, the difference of two lengths, so that reading the prompt is left out."""
    (height, width), codes = prompt.large_grid, model.model.vqmodel.config.num_embeddings
    ids = prompt.input_ids.repeat(rows, 1)

    def written(count: int) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            image_grid_thw=torch.tensor([[1, height, width]] * rows, device=device),
            images_per_sample=torch.ones(rows, dtype=torch.long, device=device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            logits_processor=LogitsProcessorList([CodebookOnly(codes)]),
            **SAMPLING,
        )

    _reset_peak(device)
    written(lengths[0])
    short, long = (_seconds(lambda count=count: written(count), device) for count in lengths)
    return {"ms_per_token": (long - short) / (lengths[1] - lengths[0]) * 1e3, "peak_bytes": _peak(device)}


def _tried(measured: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The other ways are wanted all the same."""
    try:
        return measured(*arguments)
    except Exception as error:
        return {"error": repr(error)[:600]}


def _seconds(work: Callable[[], Any], device: str) -> float:
    _synchronised(device)
    started = time.perf_counter()
    work()
    _synchronised(device)
    return time.perf_counter() - started


def _synchronised(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
