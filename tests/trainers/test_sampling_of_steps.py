"""What a step trains on: scoring beside drawing, groups drawn again, rewards of one half, references."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.lora import adapter_parameters
from glm_training.reinforcement import updates
from glm_training.reinforcement.resampling import replace_flat_groups
from glm_training.rewards import RewardError, RewardResult
from tests.runs import trainer_of, weights_of

GROUP = ("rollout.plans_per_prompt=2", "rollout.renders_per_plan=2")


def same(first, second) -> bool:
    return all(torch.equal(first[half][name], second[half][name]) for half in first for name in first[half])


def test_scoring_beside_drawing_changes_nothing(tmp_path):
    runs = []
    for overlap in ("true", "false"):
        trainer = trainer_of(
            tmp_path, "training.gradient_accumulation_steps=2", f"reward.overlap={overlap}", "training.batch_size=1"
        )
        metrics = trainer.training_step()
        runs.append((weights_of(trainer), metrics["reward/total"]))
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][0], runs[1][0])


def test_an_error_of_a_reward_beside_drawing_is_raised(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "training.gradient_accumulation_steps=2", "training.batch_size=1")

    def broken(batch):
        raise ZeroDivisionError("no score")

    monkeypatch.setattr(trainer.calculator, "compute_rewards", broken)
    with pytest.raises(RewardError, match="raised ZeroDivisionError: no score"):
        trainer.training_step()


class Flat:
    """Scores 0 for whatever its prompt's turn is in `turns`, and else what the picture is."""

    def __init__(self, trainer, turns):
        self.real, self.turns, self.seen = trainer.calculator.compute_rewards, set(turns), 0

    def __call__(self, batch):
        result = self.real(batch)
        size = 4
        total = result.total.view(-1, size).clone()
        for row in range(len(total)):
            if self.seen + row in self.turns:
                total[row] = 0.5
        self.seen += len(total)
        return RewardResult(total.flatten(), {"structure": total.flatten()}, {})


def test_flat_groups_are_replaced_by_the_next_prompts(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, *GROUP, "reward.grpo.max_resamples=3", "training.batch_size=3")
    monkeypatch.setattr(trainer.calculator, "compute_rewards", Flat(trainer, {0, 2, 3}))
    chunks = [trainer.score(trainer.draw(*trainer.next_batch(), on_step=None))]
    kept = chunks[0].rollout
    filled, figures = replace_flat_groups(trainer.resampling(), chunks)
    rollout = filled[0].rollout
    # groups 0 and 2 were flat; the fourth prompt (position 3) was flat too, then the sixth (5) came
    assert rollout.positions == [5, 1, 4]
    assert figures["reward/resampled_groups"] == 3
    before = torch.cat([torch.full((1, 2, 2), 0.5), chunks[0].rewards()[1:2], torch.full((1, 2, 2), 0.5)])
    assert figures["reward/total_before_resampling"] == pytest.approx(before.mean().item())
    assert trainer.sampler.position == 6
    assert torch.equal(rollout.images[4:8], kept.images[4:8])
    assert not torch.equal(rollout.images[:4], kept.images[:4])
    values = filled[0].rewards()
    assert (values.flatten(1).amax(1) > values.flatten(1).amin(1)).all()
    again = trainer.score(rollout).rewards()  # the scores lie beside their own pictures
    assert torch.equal(again, values)
    replayed = trainer.ar_method.deviation(trainer.parts["ar"].component, rollout.plans)
    assert replayed.max() < 1e-4


def test_no_more_prompts_are_drawn_at_once_than_a_batch_holds(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path,
        *GROUP,
        "reward.grpo.max_resamples=1",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=3",
        "reward.overlap=false",
    )
    monkeypatch.setattr(trainer.calculator, "compute_rewards", Flat(trainer, {0, 2}))
    drawn = []
    real = trainer.draw

    def counting(batch, positions, *, on_step):
        drawn.append(list(positions))
        return real(batch, positions, on_step=on_step)

    monkeypatch.setattr(trainer, "draw", counting)
    metrics = trainer.training_step()
    assert drawn == [[0], [1], [2], [3], [4]]
    assert metrics["reward/zero_spread_groups"] == 0


def test_rounds_are_bounded_and_the_rest_stays(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, *GROUP, "reward.grpo.max_resamples=2")
    monkeypatch.setattr(trainer.calculator, "compute_rewards", Flat(trainer, range(100)))
    metrics = trainer.training_step()
    assert metrics["reward/resampled_groups"] == 4
    assert metrics["reward/zero_spread_groups"] == 2


def test_each_half_is_rewarded_for_its_own(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path,
        *GROUP,
        "reward.metrics=null",
        "reward.ar.weights={structure: 1.0}",
        "reward.dit.weights={benchmarks/warmth/warmth.py:Warmth: 2.0, structure: 1.0}",
    )
    seen = {}

    def keep(run, method, chunks):
        seen["scored"] = chunks[0]
        return {}

    monkeypatch.setattr(updates, "update_ar", keep)
    metrics = trainer.training_step()
    scored = seen["scored"]
    structure = scored.shaped(scored.result.components["structure"])
    red = scored.shaped(scored.result.components["Warmth"])
    plan = structure.mean(2)
    plan = (plan - plan.mean(1, keepdim=True)) / (plan.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(scored.plan_advantages.view(2, 2), plan, rtol=1e-3, atol=1e-4)
    render = (2 * red + structure) / 3
    render = (render - render.mean(2, keepdim=True)) / (render.std(2, keepdim=True) + 1e-4)
    torch.testing.assert_close(scored.render_advantages.view(2, 2, 2), render, rtol=1e-3, atol=1e-4)
    assert metrics["reward/ar_total"] == pytest.approx(structure.mean().item())
    assert metrics["reward/dit_total"] == pytest.approx(((2 * red + structure) / 3).mean().item())


def test_a_lora_run_keeps_no_copy_and_switches_its_adapters_off(tmp_path):
    trainer = trainer_of(tmp_path, "lora.enabled=true", "lora.rank=2", "reward.grpo.kl_coef=0.1")
    start = {name: part.component for name, part in trainer.parts.items()}
    assert not any(part.average or part.old for part in trainer.parts.values())
    rollout = trainer.draw(*trainer.next_batch(), on_step=None)
    before = trainer.ar_method.score(start["ar"], rollout.plans).detach()
    with torch.no_grad():
        for weight in adapter_parameters(trainer.family.module("ar")).values():
            weight.add_(0.3)
    moved = trainer.ar_method.score(start["ar"], rollout.plans)
    with trainer.parts["ar"].as_reference():
        reference = trainer.ar_method.score(start["ar"], rollout.plans)
    assert torch.equal(reference, before) and not torch.equal(moved, before)
    assert not reference.requires_grad and moved.requires_grad


def test_an_average_as_reference_follows_slowly_and_is_resumed(tmp_path):
    options = ("reward.grpo.reference=ema", "reward.grpo.reference_decay=0.75", "reward.grpo.kl_coef=0.1")
    trainer = trainer_of(tmp_path, *options)
    start = {name: value.clone() for name, value in trainer.parts["ar"].parameters.items()}
    trainer.training_step()
    for name, value in trainer.parts["ar"].average.state_dict().items():
        now = trainer.parts["ar"].parameters[name].detach()
        torch.testing.assert_close(value, 0.75 * start[name].detach() + 0.25 * now)
    state = trainer.parts["ar"].state(with_optimizer=True)
    fresh = trainer_of(tmp_path, *options)
    fresh.parts["ar"].load_state(state)
    kept = fresh.parts["ar"].average.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in state["ar_average"].items())
