"""What supervised training is judged by: its loss on target images, worked out again from the networks' outputs."""

from __future__ import annotations

import pytest
import torch

from glm_training.utils.randomness import normal, uniform
from tests.runs import trainer_of

PLAIN = ["training.use_reward=false", "reward.enabled=false", "evaluation.enabled=true"]


@torch.no_grad()
def test_each_target_is_judged_by_its_tokens_and_at_four_levels(tmp_path) -> None:
    trainer = trainer_of(tmp_path, *PLAIN, "training.preview_loss_weight=1", "training.large_loss_weight=3")
    judged = trainer.judge()
    assert str(trainer.judged()) == "2 training targets" and judged.keys() == {"ar/loss", "dit/loss"}
    assert all(torch.equal(again, judged[name]) for name, again in trainer.judge().items()), "the same every time"
    batch, family = trainer.held_out.batch([0, 1]), trainer.family
    prompt = family.ar.encode_prompts(batch.prompts, 64, 64)
    tokens = family.ar.targets(batch.targets, prompt)
    nats = -family.ar(prompt, tokens)
    preview, large = nats[:, : prompt.preview_length].mean(1), nats[:, prompt.preview_length :].mean(1)
    torch.testing.assert_close(judged["ar/loss"], (preview + 3 * large) / 4)
    clean = family.dit.encode_images(batch.targets)
    condition = family.dit.condition(batch.prompts, tokens[:, prompt.preview_length :], prompt.large_grid)
    errors = []
    for level in range(4):
        names = [(index, level) for index in batch.indices]
        u = (level + uniform(1234, "supervised/held-out level", names, (1,))[:, 0]) / 4
        noise = normal(1234, "supervised/held-out noise", names, tuple(clean.shape[1:]))
        levels = family.denoiser(64, 64).levels(u)
        sigma = levels.spread.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        velocity = family.dit(noisy, levels.timestep, condition)
        errors.append((velocity - (noise - clean)).square().flatten(1).mean(1))
    torch.testing.assert_close(judged["dit/loss"], torch.stack(errors).mean(0), atol=1e-5, rtol=1e-5)


def test_without_targets_nothing_is_judged(tmp_path) -> None:
    (tmp_path / "plain.txt").write_text("a cat\n")
    trainer = trainer_of(tmp_path, *PLAIN, f"evaluation.eval_prompts_file={tmp_path}/plain.txt")
    assert trainer.judged() is None


@pytest.mark.parametrize("given", [True, False])
def test_what_it_is_judged_on_has_its_name(tmp_path, given) -> None:
    files = {"prompts_file": "prompts.txt", "target_images_dir": "target_images"}
    own = [f"evaluation.eval_{role}={tmp_path}/data/{name}" for role, name in files.items()] if given else []
    assert str(trainer_of(tmp_path, *PLAIN, *own).judged()) == f"2 {'held-out' if given else 'training'} targets"


@torch.no_grad()
def test_both_halves_edit_the_pairs_own_source(tmp_path) -> None:
    """Its tokens stand in the AR half's prompt; its latents and tokens are what the DiT half looks at."""
    trainer = trainer_of(tmp_path, *PLAIN, mode="i2i")
    batch, family = trainer.dataset.batch([2, 0]), trainer.family
    encoded = trainer.supervision.terms.encode(batch, [2, 0])
    clean, condition = encoded.clean, encoded.condition
    source, grid = condition.source, encoded.prompt.source_grid
    own, other = family.ar.tokenize_images(batch.sources, grid), family.ar.tokenize_images(batch.targets, grid)
    assert not torch.equal(own, other) and not torch.equal(own[0], own[1])
    assert torch.equal(encoded.prompt.source_tokens.view(2, -1), own.view(2, -1))
    assert torch.equal(source.prior_tokens[source.rows], own.view(2, -1)) and source.grid == grid
    torch.testing.assert_close(source.latents[source.rows], family.dit.encode_images(batch.sources))
    torch.testing.assert_close(clean, family.dit.encode_images(batch.targets))
    assert torch.equal(condition.prior_tokens, encoded.tokens[:, encoded.prompt.preview_length :])
    assert torch.equal(encoded.tokens, family.ar.targets(batch.targets, encoded.prompt))
