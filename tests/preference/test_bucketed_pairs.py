"""Preference pairs in their own shapes: one size for both images of a pair, none enlarged, in batches of one size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.data import DataError
from glm_training.data.dataset import sizes_of
from glm_training.data.pictures.buckets import Buckets
from glm_training.data.preference.dataset import PreferenceDataset, distinct_prompts
from glm_training.data.preference.scan import load_pairs
from glm_training.methods.losses import MethodLoss
from glm_training.trainers.dpo_trainer import DPOTrainer
from tests.preference_runs import trainer_of

SHAPES = [((128, 128), (128, 128)), ((300, 100), (290, 110)), ((200, 200), (70, 70)), ((100, 310), (300, 100))]
"""(width, height) of the preferred and the rejected image of four pairs."""
SIZES = {32: [(128, 128), (64, 192), (64, 64), (96, 64)], 64: [(128, 128), (64, 192), (64, 64), (64, 64)]}
"""(height, width) of each pair in multiples of 32 and of 64, within 128 x 128 px and within both images: those of the
last pair are turned against each other, so that no side is longer than 100."""


def write(folder: Path, shapes: list = SHAPES) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for index, pair in enumerate(shapes):
        for role, (width, height) in zip(("preferred", "rejected"), pair, strict=True):
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}_{role}.png")
        files = {role: f"{index}_{role}.png" for role in ("preferred", "rejected")}
        lines.append(json.dumps({"prompt": f"a thing {index}"} | files) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def trainer(folder: Path, family: str, *overrides: str) -> DPOTrainer:
    write(folder / "pairs")
    keys = ["data.image_size={height: 128, width: 128}", "data.buckets.enabled=true"]
    return trainer_of(folder, family, *keys, *overrides)


@pytest.mark.parametrize("multiple", [32, 64])
def test_a_pair_has_the_size_of_its_preferred_image_within_both(tmp_path: Path, multiple: int) -> None:
    report = load_pairs(write(tmp_path / "pairs"), buckets=Buckets(128 * 128, multiple))
    assert [pair.size for pair in report.pairs] == SIZES[multiple]
    listing, shapes = tmp_path / "pairs/metadata.jsonl", "row 3: 100 x 310 and 300 x 100"
    told = f"1 pair of {listing} with images of different shapes ({shapes}): cut to that of the preferred one"
    assert report.remarks == [told]
    data = PreferenceDataset(report.pairs, height=128, width=128)
    assert sizes_of(data) == SIZES[multiple]
    for index, (preferred, rejected) in enumerate(SHAPES):
        rows = data.batch([index]).images
        assert rows is not None and rows.pixels.shape == (2, 3, *SIZES[multiple][index])
        assert rows.original_sizes.tolist() == [[preferred[1], preferred[0]], [rejected[1], rejected[0]]]
    with pytest.raises(ValueError, match="one size, not"):
        data.batch([0, 1])
    assert [example.size for example in distinct_prompts(report.pairs, 3)] == SIZES[multiple][:3]


def test_prefetched_images_are_those_of_the_batch(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "pairs"), buckets=Buckets(128 * 128, 32)).pairs
    plain, threaded = (PreferenceDataset(pairs, height=128, width=128, num_workers=workers) for workers in (0, 2))
    threaded.prefetch([1])
    threaded.prefetch([3])
    assert len(threaded._pending) == 2
    for index in (3, 0):
        expected, found = plain.batch([index]).images, threaded.batch([index]).images
        assert expected is not None and found is not None and torch.equal(expected.pixels, found.pixels)
    threaded.close()


def test_a_pair_without_a_bucket_is_at_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs", [*SHAPES, ((300, 300), (300, 40))])
    with pytest.raises(DataError) as caught:
        load_pairs(path, buckets=Buckets(128 * 128, 32))
    (problem,) = caught.value.problems
    assert (problem.line, problem.index) == (5, 4) and problem.image == path / "4_rejected.png"
    assert problem.reason == "rejected image has 300 x 40 pixels, and the smallest bucket is 64 x 64"
    assert len(load_pairs(path, buckets=Buckets(128 * 128, 32), max_bad_fraction=0.5).pairs) == 4


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
@pytest.mark.parametrize("cache", [[], ["dpo.cache=false", "dpo.cache_dir=null"]])
def test_each_pair_is_learnt_and_judged_at_its_own_size(tmp_path: Path, family: str, cache: list[str]) -> None:
    sizes = SIZES[64 if family == "sdxl" else 32]
    component = ["model.component=both"] if family == "glm_image" else []
    run = trainer(tmp_path, family, *cache, "training.batch_size=3", *component)
    run.prepare()
    latents = run.family.unet if family == "sdxl" else run.family.dit
    down = 128 // latents.latent_shape(128, 128)[1]
    seen: list[int] = []
    real = run._loss

    def loss(part, network, pairs, noise, levels):
        (size,) = {sizes[pair.index] for pair in pairs.pairs}
        if pairs.clean is not None:
            assert pairs.clean.shape[-2:] == tuple(side // down for side in size)
        if family == "sdxl":
            assert pairs.condition.time_ids[:, 4:].tolist() == [list(map(float, size))] * 2 * len(pairs.pairs)
            shapes = [SHAPES[pair.index][which] for which in (0, 1) for pair in pairs.pairs]
            assert pairs.condition.time_ids[:, :2].tolist() == [[float(h), float(w)] for w, h in shapes]
        else:
            assert (pairs.condition.height, pairs.condition.width) == size
        seen.extend(pair.index for pair in pairs.pairs)
        return real(part, network, pairs, noise, levels)

    run._loss = loss  # type: ignore[method-assign]
    batches = -(-sizes.count((64, 64)) // 3) + len(set(sizes)) - 1
    for _ in range(batches):
        run.training_step()
    assert sorted(seen) == sorted([*range(4)] * len(run.parts))
    judged = run.judge()
    assert all(len(values) == 2 and not values.isnan().any() for values in judged.values())
    held_out = run.held_out
    assert sizes_of(held_out) == sizes[:2]


def test_a_short_chunk_weighs_by_its_pairs(tmp_path: Path, monkeypatch) -> None:
    """Of the four pairs two have one size, in SDXL's multiples: chunks of 2, 1 and 1 pairs. Each chunk's mean loss is
    the mean of its pairs' numbers, and the step's is that of all: 1.5."""
    run = trainer(tmp_path, "sdxl", "dpo.cache=false", "dpo.cache_dir=null", "training.gradient_accumulation_steps=3")
    part = run.parts["unet"]
    weight = next(iter(part.parameters.values()))
    handed: list[float] = []

    def loss(part, network, pairs, noise, levels):
        numbers = [pair.index for pair in pairs.pairs]
        return MethodLoss(0 * weight.sum() + sum(numbers) / len(numbers), len(numbers), {})

    run._loss = loss  # type: ignore[method-assign]
    monkeypatch.setattr(part, "backward", lambda loss: handed.append(loss.item()))
    monkeypatch.setattr(run, "update", lambda part: {})
    figures = run.training_step()
    assert len(handed) == 3 and sum(handed) == pytest.approx(1.5)
    assert figures["unet/loss"] == pytest.approx(1.5)
