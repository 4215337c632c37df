"""The plans that GLM-Image's AR half writes for a distillation run."""

from __future__ import annotations

import torch

from glm_training.config import load_config
from glm_training.engine.families import PlanConditions
from glm_training.models.glm_image.family import GLMImage

PROMPTS = ["a red circle", "a blue square"]


def conditions(tmp_path, family: GLMImage, *overrides: str) -> PlanConditions:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "run.yaml"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    file.write_text(f"data: {{prompts_file: {prompts}}}\ntraining: {{method: dmdr}}\n", encoding="utf-8")
    keys = ["model.name=tiny-random", "data.image_size.height=64", "data.image_size.width=64", *overrides]
    return PlanConditions(load_config(file, keys), family)


def test_plans_are_kept_and_taken_in_turn(tmp_path, monkeypatch) -> None:
    family = GLMImage.load("tiny-random")
    drawn = conditions(tmp_path, family, "dmdr.plans_per_prompt=2")
    written = []
    rollout = family.ar.rollout
    monkeypatch.setattr(
        family.ar, "rollout", lambda prompt, *rest, **o: (written.append(1), rollout(prompt, *rest, **o))[1]
    )
    first = drawn.of(PROMPTS, [0, 1], [0, 0])
    second = drawn.of(PROMPTS, [0, 1], [1, 1])
    assert not torch.equal(first.prior_tokens, second.prior_tokens)
    again = drawn.of(PROMPTS[::-1], [1, 0], [2, 3])  # of epochs 2 and 3 with two plans: the first and the second
    assert len(written) == 2
    assert torch.equal(again.prior_tokens, torch.stack([first.prior_tokens[1], second.prior_tokens[0]]))


def test_a_plan_depends_on_its_prompt_and_number_alone(tmp_path) -> None:
    family = GLMImage.load("tiny-random")
    together = conditions(tmp_path, family).of(PROMPTS, [0, 1], [0, 0])
    alone = conditions(tmp_path, family).of(PROMPTS[1:], [1], [4])  # epoch 4 of 4 plans
    assert torch.equal(together.prior_tokens[1:], alone.prior_tokens)
    other = conditions(tmp_path, family, "seed=1").of(PROMPTS[1:], [1], [0])
    assert not torch.equal(alone.prior_tokens, other.prior_tokens)
