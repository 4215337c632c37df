"""Held-out scores: which noise, prompt and target each sample has, and what is made of several."""

from __future__ import annotations

import pytest
import torch

from glm_training.data import Batch
from glm_training.evaluation.held_out import Evaluation, EvaluationSettings, _interleaved, combined, evaluate
from glm_training.models.family import Sampling
from glm_training.rewards import RewardCalculator, RewardResult
from glm_training.utils.distributed import World

PROMPTS = ["a", "b", "c"]
SAMPLING = Sampling(0.9, 0.75, True, 4, 1.5)


class Noting:
    """A family whose picture of item i, sample s has the value (10 i + s) / 100; item numbers are the data's."""

    components = ("dit",)

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def component(self, name):
        return torch.nn.Linear(1, 1)

    def draw(self, prompts, *, samples, prompt_ids, **options):
        self.asked.append({"prompts": prompts, "samples": samples, "ids": prompt_ids, **options})
        values = [(10 * item + sample) / 100 for item in prompt_ids for sample in range(samples)]
        return torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


class Rewards(RewardCalculator):
    """total: the picture's value over 1; own: NaN for the prompt "b". It notices another's prompt or target."""

    def compute_rewards(self, batch):
        items = [int(round(float(value) * 100)) // 10 - 5 for value in batch.images[:, 0, 0, 0]]
        assert batch.prompts == [PROMPTS[item] for item in items]
        assert batch.targets[:, 0, 0, 0].tolist() == pytest.approx([item / 4 for item in items])
        total = batch.images[:, 0, 0, 0]
        own = torch.tensor([float("nan") if prompt == "b" else 1.0 for prompt in batch.prompts])
        return RewardResult(total, {"own": own}, {})


def found(samples: int, keep: int, at_once: int = 16) -> tuple[Evaluation, Noting]:
    family = Noting()
    targets = torch.tensor([0.0, 0.25, 0.5]).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)
    batch = Batch([5, 6, 7], PROMPTS, targets, None)
    settings = EvaluationSettings(64, 96, samples, 11, SAMPLING, 3, 2)
    result = evaluate(
        family, Rewards(), batch, settings, World(), keep_images=keep, prompts_at_once=at_once, stopped=lambda: False
    )  # type: ignore[arg-type]
    return result, family


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_a_prompts_score_is_the_mean_of_its_samples(at_once):
    result, family = found(2, 2, at_once)
    assert result.scores["total"].tolist() == pytest.approx([0.505, 0.605, 0.705])
    assert result.scores["own"].isnan().tolist() == [False, True, False]
    assert result.means() == {"total": pytest.approx(0.605), "own": 1.0}
    assert result.images[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.6]), "the first sample of the first prompts"
    assert result.shown["total"].tolist() == pytest.approx([0.5, 0.6]), "what those pictures earned"
    assert result.shown["own"].isnan().tolist() == [False, True]
    assert [item for call in family.asked for item in call["ids"]] == [5, 6, 7]


def test_pictures_are_drawn_as_the_settings_say():
    call = found(2, 1)[1].asked[0]
    assert (call["height"], call["width"], call["seed"], call["micro_batch_size"]) == (64, 96, 11, 3)
    assert call["vae_batch_size"] == 2
    assert call["sampling"] is SAMPLING and call["samples"] == 2 and call["sources"] is None


def test_what_applies_nowhere_has_no_mean():
    scores = {"total": torch.tensor([0.5, 1.0]), "none": torch.full((2,), float("nan"))}
    assert Evaluation(scores, torch.zeros(0, 3, 1, 1)).means() == {"total": 0.75}


def test_scores_of_several_processes_come_back_in_the_order_of_the_prompts():
    """Process r has the prompts r, r + 2, ... of five; the one with two repeats the last."""
    gathered = ["a0", "a2", "a4", "b1", "b3", "b4"]
    assert [gathered[place][1] for place in _interleaved(5, 3, 2)] == list("01234")


def test_evaluations_of_several_sizes_are_one() -> None:
    """Prompts 0 and 2 of one size, 1 and 3 of another; of the first three the pictures are kept."""
    first, second = (
        Evaluation({"total": torch.tensor([1.0, 3.0])}, torch.full((2, 3, 2, 2), 0.1)),
        Evaluation({"total": torch.tensor([2.0, 4.0]), "own": torch.tensor([7.0, 8.0])}, torch.ones(1, 3, 4, 1)),
    )
    first.images[1] += 0.1
    first.shown["total"], second.shown["total"] = torch.tensor([0.5, 0.7]), torch.tensor([0.6])
    second.shown["own"] = torch.tensor([9.0])
    result = combined([[0, 2], [1, 3]], [first, second])
    assert result.scores["total"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert result.scores["own"].isnan().tolist() == [True, False, True, False] and result.scores["own"][3] == 8
    assert [list(image.shape) for image in result.images] == [[3, 2, 2], [3, 4, 1], [3, 2, 2]]
    assert result.images[2].mean().item() == pytest.approx(0.2)
    assert result.means() == {"total": 2.5, "own": 7.5}
    assert result.shown["total"].tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert result.shown["own"].isnan().tolist() == [True, False, True] and result.shown["own"][1] == 9


def test_no_picture_need_be_kept() -> None:
    result, _ = found(2, 0)
    assert len(result.images) == 0 and len(result.scores["total"]) == 3
    together = combined([[0, 1, 2], [3]], [result, Evaluation({"total": torch.ones(1)}, torch.ones(0, 3, 1, 1))])
    assert together.images == [] and len(together.scores["total"]) == 4
