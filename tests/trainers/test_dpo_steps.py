"""A preference step's draws and weights: what is dropped, at which noise level, against which reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glm_training.methods.losses import MethodLoss
from glm_training.preference.encoded_pairs import EncodedPairs
from tests.preference_runs import trainer_of

AR = ["model.component=ar", "lora.enabled=true", "lora.rank=2"]


def test_which_prompts_are_dropped_has_nothing_to_do_with_the_noise_level(tmp_path):
    """Of 600 pairs 40 % lose their prompt, and those have the mean level of all, within five standard errors."""
    trainer = trainer_of(tmp_path, "sdxl", "dpo.prompt_dropout=0.4")
    seen, batch = {}, SimpleNamespace(pairs=[])
    trainer.next_batch = lambda: (batch, list(range(600)))  # type: ignore[method-assign]
    trainer.encoder.encode = lambda batch, drop=None: (
        seen.update(drop=drop) or EncodedPairs([], torch.zeros(2, 1, 1, 1))
    )
    weight = next(iter(trainer.parts["unet"].parameters.values()))

    def loss(part, network, pairs, noise, levels):
        seen.update(levels=levels.timestep, noise=noise)
        return MethodLoss(0 * weight.sum(), 600, {})

    trainer._loss = loss  # type: ignore[method-assign]
    trainer.training_step()
    drop, levels = seen["drop"], seen["levels"].float()
    assert drop.float().mean().item() == pytest.approx(0.4, abs=5 * (0.4 * 0.6 / 600) ** 0.5)
    for rows in (drop, ~drop):
        assert levels[rows].mean().item() == pytest.approx(499.5, abs=5 * 1000 / (12 * int(rows.sum())) ** 0.5)
    assert len(seen["noise"].flatten().unique()) == 600, "each pair has noise of its own"


def test_pairs_that_came_later_are_compared_with_the_start_and_not_with_what_was_learnt(tmp_path):
    trainer = trainer_of(tmp_path, "glm_image", *AR)
    trainer.prepare()
    start = dict(trainer.references._values)
    for parameter in trainer.parts["ar"].parameters.values():
        parameter.data.add_(0.3)
    digests = list(start)
    trainer.references._values = {digest: start[digest] for digest in digests[:2]}
    trainer.step = 1
    trainer._fill_references(trainer.dataset)
    assert trainer.references._values == start
    moved = trainer._reference_of(
        SimpleNamespace(reference=None, component=trainer.parts["ar"].component), encoded(trainer)
    )
    assert all(abs(moved[digest][0] - start[digest][0]) > 1e-3 for digest in moved), "the weights had moved"


def encoded(trainer) -> EncodedPairs:
    return trainer.encoder.encode(trainer.dataset.batch([0, 1]))


def term_of(trainer, name: str):
    """The loss of two pairs with the adapters moved away from the start."""
    trainer.prepare()
    part = trainer.parts[name]
    for i, parameter in enumerate(part.parameters.values()):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    pairs = encoded(trainer)
    noise = trainer._noise(pairs, 0, "a test", [(0,), (1,)])
    return trainer._loss(part, part.policy, pairs, noise, trainer._levels(torch.tensor([0.3, 0.8]), (64, 64)))


@pytest.mark.parametrize(("family", "key", "name"), [("sdxl", "beta", "unet"), ("glm_image", "ar_beta", "ar")])
def test_the_margin_is_proportional_to_the_parts_own_beta(tmp_path, family, key, name):
    keys = ["dpo.beta=7", "dpo.ar_beta=0.7"] if key == "beta" else ["dpo.beta=0.7", "dpo.ar_beta=0.01"]
    low = term_of(trainer_of(tmp_path, family, *(AR if name == "ar" else []), *keys), name).metrics["margin"]
    own = f"dpo.{key}={21 if key == 'beta' else 0.03}"
    high = term_of(trainer_of(tmp_path, family, *(AR if name == "ar" else []), *keys, own), name).metrics["margin"]
    assert low.abs() > 1e-6 and high.item() == pytest.approx(3 * low.item(), rel=1e-4)


def test_sft_of_the_ar_half_weighs_both_grids_as_the_configuration_says(tmp_path):
    weights = ["training.preview_loss_weight=1", "training.large_loss_weight=3"]
    term = term_of(trainer_of(tmp_path, "glm_image", *AR, "dpo.loss=sft", *weights), "ar")
    preview, large = (term.metrics[f"{name}_loss"] for name in ("preview", "large"))
    assert preview != large
    torch.testing.assert_close(term.loss.detach(), (preview + 3 * large) / 4)


def test_a_step_is_the_mean_of_its_chunks_in_training_mode_and_pairs_are_judged_in_evaluation_mode(tmp_path):
    """Losses 3, 6 and 9 of 1, 1 and 2 rows: gradients of the thirds; the log's mean is over rows, 27 / 4."""
    trainer = trainer_of(tmp_path, "sdxl", "training.gradient_accumulation_steps=3")
    part, modes, lasts, losses = trainer.parts["unet"], [], [], []
    weight = next(iter(part.parameters.values()))
    terms = iter([MethodLoss(0 * weight.sum() + loss, rows) for loss, rows in ((3.0, 1), (6.0, 1), (9.0, 2))])

    def loss(part, network, pairs, noise, levels):
        modes.append(trainer.family.unet.unet.training)
        return next(terms, MethodLoss(weight.sum(), 2, {}, {"loss": torch.tensor([1.0, 2.0])}))

    accumulating = part.accumulating
    trainer.encoder.encode = lambda batch, drop=None: EncodedPairs([], torch.zeros(2, 1, 1, 1))
    trainer._loss = loss  # type: ignore[method-assign]
    trainer.update = lambda part: {"grad_norm": 0.5}  # type: ignore[method-assign]
    part.accumulating = lambda last: lasts.append(last) or accumulating(last)  # type: ignore[method-assign]
    part.backward = lambda loss: losses.append(loss.item())  # type: ignore[method-assign]
    trainer.family.eval()
    figures = trainer.training_step()
    assert modes == [True] * 3 and lasts == [False, False, True] and losses == [1, 2, 3]
    assert figures == {"unet/loss": pytest.approx(6.75), "unet/grad_norm": 0.5}
    modes.clear()
    trainer.family.train()
    trainer.judge()
    assert set(modes) == {False}


def test_held_out_pairs_are_judged_once_in_each_quarter_of_the_levels(tmp_path):
    trainer = trainer_of(tmp_path, "sdxl", f"evaluation.eval_pairs={tmp_path}/pairs", "training.batch_size=4")
    trainer.prepare()
    levels = []
    real = trainer._levels
    trainer._levels = lambda u, size: levels.append(u.tolist()) or real(u, size)  # type: ignore[method-assign]
    trainer.judge()
    assert [[int(4 * u) for u in row] for row in levels] == [[quarter] * 4 for quarter in range(4)]
    assert len({u * 4 % 1 for row in levels for u in row}) == 16, "drawn apart"


@pytest.mark.parametrize(("loss", "images"), [("dpo", 2), ("sft", 1)])
def test_a_step_trains_on_both_images_of_a_pair_or_the_preferred_one(tmp_path, loss, images):
    trainer = trainer_of(tmp_path, "sdxl", f"dpo.loss={loss}", "training.gradient_accumulation_steps=3")
    assert trainer.images_of(trainer.sampler.rows_ahead(3)) == 2 * 3 * images
    trainer.sampler.world_size = 4
    assert trainer.images_of(trainer.sampler.rows_ahead(3)) == 2 * 3 * 4 * images
