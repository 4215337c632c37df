"""Peaks that `plan` works out against peaks that were measured, and some that are measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import full_width
from benchmarks.plan_peaks import (
    CASES,
    GLYPHS,
    PROMPT,
    Case,
    adapted,
    ar_of,
    filled,
    forward_of,
    measure,
    network_of,
    read_cases,
    worked_out,
)
from glm_training.models.glm_image.positions import generation_grids
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.models.loading import published_configuration
from glm_training.planning import counting
from glm_training.planning.models import build_network
from glm_training.planning.passes import ar_inference, dit_inference, unet_inference, vae_decoding
from glm_training.planning.tracing import faking, most_held, with_tensors

ROOT = Path(__file__).parents[2]

WITHIN = 0.10
RECORDED = read_cases((ROOT / "benchmarks/results/plan_peaks.json").read_text(encoding="utf-8"))


def off(case: Case, measured: dict[str, float]) -> dict[str, float]:
    expected = worked_out(case)
    return {name: expected[name] / peak - 1 for name, peak in measured.items()}


@pytest.mark.parametrize("case, measured", RECORDED, ids=[case.name for case, _ in RECORDED])
def test_recorded_peaks(case, measured):
    assert all(abs(share) <= WITHIN for share in off(case, measured).values()), off(case, measured)


def test_enough_was_recorded():
    names = {case.name for case, _ in RECORDED}
    assert names == {case.name for case in CASES}
    assert sum(not case.change for case, _ in RECORDED) >= 8, "of the published sizes"
    assert sum(case.real for case, _ in RECORDED) >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_published_vae_holds_what_is_said_of_it_while_it_decodes(dtype):
    settings = published_configuration("glm_image", "vae")
    network = build_network("glm_image", "vae", settings).eval().requires_grad_(False)
    with faking(), torch.no_grad():
        vae, latents = with_tensors(network, lambda param: dtype), torch.zeros(2, 16, 128, 128, dtype=dtype)
        peak = most_held(lambda: vae.decode(latents, return_dict=False)[0].float(), vae)
    assert vae_decoding(settings["block_out_channels"], 2, 1024**2, dtype.itemsize) == pytest.approx(peak, rel=0.02)


DRAWING = [(False, False), (True, False), (False, True)]
"""Of the weights: with adapters, trained whole, or neither."""


def held_in_drawing(case: Case, *, adapters: bool) -> tuple[int, float]:
    """Bytes of a pass without gradient: measured, and worked out."""
    network, pipeline = network_of(case), build_tiny()
    if adapters:
        adapted(case, network)
    with faking():
        filled(network, case)
        _, forward = forward_of(case, network.eval(), pipeline)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
            measured = most_held(forward, network)
    at = case.precision
    if case.network == "dit":
        tokens = (case.side // 16) ** 2 + GLYPHS
        return measured, dit_inference(counting.dit_sizes(network), case.rows, tokens, at, adapters=adapters)
    if case.network == "unet":
        return measured, unet_inference(counting.unet_sizes(network), case.rows, (case.side // 8) ** 2, at)
    written = sum(rows * columns for rows, columns in generation_grids(case.side, case.side, "t2i"))
    sizes, tokens = counting.ar_sizes(network), PROMPT + written - 1
    return measured, ar_inference(sizes, case.rows, tokens, at, adapters=adapters)


@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize(("adapters", "whole"), DRAWING)
@pytest.mark.parametrize("network", ["dit", "ar"])
def test_what_a_half_holds_while_it_draws(network, adapters, whole, amp):
    """Of the published widths. Casts are counted of all layers, and the last one's are not there yet at the peak."""
    layers = 10 if whole and amp else 2
    change = {"num_layers": layers} if network == "dit" else ar_of(layers)
    measured, expected = held_in_drawing(Case("", network, 2, 1024, whole, False, change, amp=amp), adapters=adapters)
    assert expected / measured == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize(("adapters", "whole"), DRAWING)
def test_what_the_unet_holds_while_it_draws(adapters, whole, amp):
    """Within a fifth of what is small beside its weights: 0.4 to 0.6 of 5 GB."""
    measured, expected = held_in_drawing(Case("", "unet", 4, 1024, whole, False, {}, amp=amp), adapters=adapters)
    assert expected / measured == pytest.approx(1, abs=0.2)


SMALL = {"num_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "case",
    [
        Case("dit", "dit", 2, 256, False, True, SMALL),
        Case("dit kept", "dit", 2, 256, True, False, SMALL, amp=False),
        Case("real dit", "dit", 1, 256, False, True, SMALL, amp=False, real=True),
        Case(
            "unet",
            "unet",
            2,
            256,
            True,
            True,
            {
                "block_out_channels": [64, 64, 128],
                "attention_head_dim": [1, 1, 2],
                "transformer_layers_per_block": [1, 1, 2],
            },
        ),
    ],
    ids=lambda case: case.name,
)
def test_measured_here(case):
    found = off(case, measure(case))
    assert all(abs(share) <= WITHIN for share in found.values()), found


STEPS_ON_A_CPU = json.loads(full_width.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", STEPS_ON_A_CPU, ids=[f"{run['component']} {run['size']}" for run in STEPS_ON_A_CPU])
def test_steps_of_the_published_widths_that_were_taken(run, monkeypatch):
    """Phase by phase; the file has the plan of today: python -m benchmarks.full_width --replan"""
    monkeypatch.chdir(ROOT)
    told = full_width.beside_plan(json.loads(json.dumps(run)))
    assert told == run
    beside = [phase["planned"] / phase["tensors"] for phase in told["phases"].values() if "planned" in phase]
    assert len(beside) >= 4 and all(abs(share - 1) <= WITHIN for share in beside), beside
