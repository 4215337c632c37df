"""New samples in the places of those that give way: everything of a prompt goes with it."""

from __future__ import annotations

import torch

from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.resampling import _fill
from glm_training.reinforcement.rollout import Rollout
from glm_training.rewards import RewardResult
from tests.methods.toys import prompt_of, trajectory_of


def scored(*numbers: int, failing: int | None = None, first_prompt: int = 0) -> Scored:
    """Prompts by number, each with two plans of two renders: sample s of prompt n is 10 n + s everywhere."""
    plans = torch.tensor([10.0 * n + s for n in numbers for s in range(2)])
    images = torch.tensor([10.0 * n + s for n in numbers for s in range(4)])
    per_prompt = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1)
    rollout = Rollout(
        [f"prompt {n}" for n in numbers],
        list(numbers),
        ARRollout(prompt_of(len(plans)), plans[:, None].repeat(1, 6), torch.zeros(len(plans), 6), None, 1),
        trajectory_of(images.view(-1, 1, 1, 1).repeat(1, 1, 1, 2)),
        images.view(-1, 1, 1, 1).repeat(1, 3, 1, 1),
        per_prompt.repeat(1, 3, 1, 1),
        -per_prompt.repeat(1, 3, 1, 1),
    )
    failures = {} if failing is None else {failing: "no eyes"}
    return Scored(rollout, RewardResult(images, {"m": -images}, failures), first_prompt=first_prompt)


def test_a_new_prompt_brings_all_that_is_its_own():
    chunks = [scored(1, 2, failing=3), scored(3, 4, 5, failing=0, first_prompt=2)]
    flat = [torch.tensor([False, True]), torch.tensor([True, False, True])]
    filled = _fill(chunks, flat, scored(6, 7, 8, failing=5))  # type: ignore[arg-type]
    for chunk, numbers, failing in zip(filled, [(1, 6), (7, 4, 8)], [{3}, {1}], strict=True):
        rollout, images = chunk.rollout, [10.0 * n + s for n in numbers for s in range(4)]
        assert rollout.prompts == [f"prompt {n}" for n in numbers] and rollout.positions == list(numbers)
        assert rollout.plans.tokens[:, 0].tolist() == [10.0 * n + s for n in numbers for s in range(2)]
        assert rollout.renders.final[:, 0, 0, 0].tolist() == images
        assert rollout.images[:, 0, 0, 0].tolist() == images
        assert rollout.targets[:, 0, 0, 0].tolist() == list(numbers)
        assert rollout.sources[:, 0, 0, 0].tolist() == [-n for n in numbers]
        assert chunk.result.total.tolist() == images and chunk.result.components["m"].tolist() == [-i for i in images]
        assert set(chunk.result.failures) == failing
    assert [chunk.first_prompt for chunk in filled] == [0, 2]
