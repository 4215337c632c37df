"""NFT's slow policy draws and follows the trained weights at its decay; so does the KL's slow reference."""

from __future__ import annotations

import pytest
import torch

from tests.runs import trainer_of, weights_of

NFT = ["model.component=dit", "reward.grpo.dit.method=nft", "training.batch_size=1", "reward.grpo.num_samples=2"]


def test_the_old_policy_keeps_its_decay_of_itself(tmp_path):
    """old <- d old + (1 - d) trained, twice: from the start s over w1 to w2 it is d^2 s + d (1 - d) w1 + (1 - d) w2."""
    decay = 0.25
    trainer = trainer_of(tmp_path, *NFT, f"reward.grpo.dit.old_decay={decay}", "training.learning_rate=0.5")
    weights = [weights_of(trainer)["dit"]]
    for _ in range(2):
        trainer.training_step()
        trainer.step += 1
        weights.append(weights_of(trainer)["dit"])
    start, first, second = weights
    moved = 0.0
    for name, old in trainer.parts["dit"].old.state_dict().items():
        wanted = decay**2 * start[name] + decay * (1 - decay) * first[name] + (1 - decay) * second[name]
        torch.testing.assert_close(old, wanted, rtol=1e-5, atol=1e-6)
        moved = max(moved, (second[name] - start[name]).abs().max().item())
    assert moved > 1e-3


@pytest.mark.parametrize(("kind", "step", "decay"), [("fast", 100, 0.1), ("slow", 100, 0.1875), ("0.3", 100, 0.3)])
def test_the_decay_follows_the_schedule_of_its_name(tmp_path, kind, step, decay):
    """fast: 0.001 k; slow: 0.0075 (k - 75)."""
    trainer = trainer_of(tmp_path, *NFT, f"reward.grpo.dit.old_decay={kind}", "training.max_steps=200")
    asked = []
    trainer.parts["dit"].old.update = asked.append
    trainer.step = step
    trainer.training_step()
    assert asked == [pytest.approx(decay)]


def drawn(trainer) -> torch.Tensor:
    batch = trainer.dataset.batch([0])
    return trainer.draw(batch, [0], on_step=None).images


def test_rollouts_are_drawn_by_the_old_policy(tmp_path):
    trainer = trainer_of(tmp_path, *NFT)
    before = drawn(trainer)
    with torch.no_grad():
        for parameter in trainer.parts["dit"].parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn(trainer), before)
    trainer.parts["dit"].old.copy_from_current()
    assert (drawn(trainer) - before).abs().max() > 1e-3


def test_a_slow_reference_follows_the_weights_after_each_step(tmp_path):
    keys = ["model.component=ar", "training.batch_size=1", "reward.grpo.reference=ema", "reward.grpo.num_samples=2"]
    trainer = trainer_of(tmp_path, *keys, "reward.grpo.reference_decay=0.75", "reward.grpo.updates_per_rollout=2")
    start = weights_of(trainer)["ar"]
    trainer.training_step()
    now = weights_of(trainer)["ar"]
    for name, value in trainer.parts["ar"].average.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * now[name], rtol=1e-5, atol=1e-7)
    assert max((now[name] - start[name]).abs().max() for name in start) > 1e-4
    with trainer.parts["ar"].as_reference():
        for name, value in trainer.parts["ar"].parameters.items():
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * now[name], rtol=1e-5, atol=1e-7)


def test_the_reference_is_the_start_unless_it_is_told_to_follow(tmp_path):
    trainer = trainer_of(tmp_path, "model.component=ar", "training.batch_size=1", "reward.grpo.num_samples=2")
    start = weights_of(trainer)["ar"]
    trainer.training_step()
    with trainer.parts["ar"].as_reference():
        assert all(torch.equal(value, start[name]) for name, value in trainer.parts["ar"].parameters.items())
