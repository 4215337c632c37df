"""A supervised step's draws and weights, with a family that only notes what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from glm_training.data import Batch
from glm_training.methods.losses import MethodLoss
from glm_training.trainers.supervised_terms import GLMTerms
from glm_training.trainers.supervised_trainer import SupervisedTrainer, Supervision
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

PART = SimpleNamespace(name="dit", policy=None)


def played(tmp_path, *overrides: str, positions=range(600)):
    """What the flow-matching loss is given for the samples at `positions`, and the condition's arguments."""
    given, asked = {}, []
    count = len(positions)
    dit = SimpleNamespace(device=torch.device("cpu"), condition=lambda *arguments: asked.append(arguments))
    ar = SimpleNamespace(grids=lambda height, width, mode: ((1, 2), (height // 32, width // 32)))
    encoded = {
        "tokens": torch.arange(6 * count).view(count, 6),
        "latents": torch.arange(count).float().view(-1, 1, 1, 1) + 10,
    }
    encoding = SimpleNamespace(world=World(), shown=lambda views, rows: encoded)
    config = config_of(tmp_path, "model.component=dit", *overrides)
    terms = GLMTerms(config, SimpleNamespace(ar=ar, dit=dit), encoding)  # type: ignore[arg-type]
    terms.flow = SimpleNamespace(loss=lambda *arguments, **named: given.update(named, clean=arguments[2]))
    batch = Batch(list(range(count)), ["a"] * count, torch.zeros(count, 3, 64, 64), None)
    terms.loss(PART, terms.encode(batch, list(positions)))
    return given, asked[0]


def test_which_rows_lose_their_condition_has_nothing_to_do_with_their_noise_level(tmp_path):
    """Of 600 rows 40 % are dropped, and those have the mean level of all, 1/2; bounds are five standard deviations."""
    given, _ = played(tmp_path, "training.prior_dropout=0.4")
    drop, u = given["drop"], given["u"]
    assert drop.float().mean().item() == pytest.approx(0.4, abs=5 * (0.4 * 0.6 / 600) ** 0.5)
    assert u[drop].mean().item() == pytest.approx(0.5, abs=5 / (12 * 240) ** 0.5)
    assert u[~drop].mean().item() == pytest.approx(0.5, abs=5 / (12 * 360) ** 0.5)
    assert u.min() < 0.02 and u.max() > 0.98


@pytest.mark.parametrize(("share", "dropped"), [(0, 0), (1, 600)])
def test_all_or_none_may_lose_it(tmp_path, share, dropped):
    assert int(played(tmp_path, f"training.prior_dropout={share}")[0]["drop"].sum()) == dropped


def test_levels_follow_the_density_that_was_asked_for(tmp_path):
    """Of a logit-normal 68.3 % lie where |logit u| < 1."""
    u = played(tmp_path, "training.timestep_density=logit_normal")[0]["u"]
    share = (torch.logit(u).abs() < 1).float().mean().item()
    assert share == pytest.approx(0.683, abs=5 * (0.683 * 0.317 / 600) ** 0.5)


def test_draws_belong_to_a_place_in_the_run_alone(tmp_path):
    whole, part = played(tmp_path, positions=range(8))[0], played(tmp_path, positions=[5, 2])[0]
    for name in ("u", "noise", "drop"):
        assert torch.equal(whole[name][[5, 2]], part[name]), name
    other = played(tmp_path, "seed=4", positions=range(8))[0]
    assert not torch.equal(other["u"], whole["u"]) and not torch.equal(other["noise"], whole["noise"])
    assert len(whole["noise"].flatten().unique()) == 8


def test_the_dit_half_learns_under_the_large_grids_own_tokens(tmp_path):
    given, (prompts, tokens, grid, *_) = played(tmp_path, positions=[0, 1])
    assert tokens.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]] and grid == (2, 2) and prompts == ["a", "a"]
    assert given["clean"].flatten().tolist() == [10, 11]


def test_both_grids_are_weighted_as_the_configuration_says(tmp_path):
    config = config_of(tmp_path, "training.preview_loss_weight=0.25", "training.large_loss_weight=3")
    tokens = GLMTerms(config, None, None).tokens  # type: ignore[arg-type]
    assert (tokens.preview_weight, tokens.large_weight) == (0.25, 3)


@pytest.mark.parametrize(("epochs", "chunks", "steps"), [(3, 1, 6), (3, 4, 2), (1, 2, 1)])
def test_a_run_has_the_steps_of_its_epochs(tmp_path, epochs, chunks, steps):
    """Four prompts, two at once: two batches per epoch, `chunks` of them in a step; the last one may overshoot."""
    keys = [
        f"training.num_epochs={epochs}",
        f"training.gradient_accumulation_steps={chunks}",
        "training.max_steps=null",
    ]
    trainer = trainer_of(tmp_path, *keys, "training.use_reward=false", "model.component=dit")
    assert trainer.total_steps == trainer.parts["dit"].total_steps == steps


def test_a_step_is_the_mean_of_its_chunks_in_training_mode_exchanged_at_the_last(tmp_path, monkeypatch):
    """Losses 3, 6 and 9 of 1, 1 and 2 rows: gradients of the thirds; the log's mean is over rows, 27 / 4."""
    keys = ["training.use_reward=false", "model.component=dit", "training.gradient_accumulation_steps=3"]
    trainer = trainer_of(tmp_path, *keys)
    part = trainer.parts["dit"]
    weight = next(iter(part.parameters.values()))
    terms = [MethodLoss(0 * weight.sum() + loss, rows, {}) for loss, rows in ((3.0, 1), (6.0, 1), (9.0, 2))]
    supervision, modes, lasts, losses = trainer.supervision, [], [], []

    def loss(part, batch):
        modes.append(trainer.family.dit.transformer.training)
        return terms[len(modes) - 1]

    accumulating = part.accumulating
    monkeypatch.setattr(supervision.terms, "encode", lambda batch, positions: None)
    monkeypatch.setattr(supervision.terms, "loss", loss)
    monkeypatch.setattr(part, "accumulating", lambda last: lasts.append(last) or accumulating(last))
    monkeypatch.setattr(part, "backward", lambda loss: losses.append(loss.item()))
    monkeypatch.setattr(trainer, "update", lambda part: {"grad_norm": 0.5})
    trainer.family.eval()
    figures = trainer.training_step()
    assert modes == [True] * 3 and lasts == [False, False, True] and losses == [1, 2, 3]
    assert figures == {"dit/loss": pytest.approx(6.75), "dit/grad_norm": 0.5}


def test_masks_of_dropout_have_a_place_in_the_run_and_leave_the_global_generator_alone(tmp_path):
    keys = ["training.use_reward=false", "lora.enabled=true", "lora.dropout=0.5"]
    config = config_of(tmp_path, *keys)

    def masks(part="dit", step=3, rank=1, chunk=2, config=config) -> tuple[float, ...]:
        world = SimpleNamespace(device=torch.device("cpu"), rank=rank)
        run = SimpleNamespace(world=world, step=step)
        state = torch.random.get_rng_state()
        with Supervision(config, None, None)._dropout_masks(run, part, chunk):  # type: ignore[arg-type]
            drawn = tuple(torch.rand(8).tolist())
        assert torch.equal(torch.random.get_rng_state(), state)
        return drawn

    first = masks()
    torch.manual_seed(99)
    assert masks() == first
    others = [masks("ar"), masks(step=4), masks(rank=0), masks(chunk=1)]
    others.append(masks(config=config_of(tmp_path, *keys, "seed=4")))
    assert len({first, *others}) == 6


def test_without_dropout_nothing_is_seeded(tmp_path):
    world = SimpleNamespace(device=torch.device("cpu"), rank=0)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    supervision = Supervision(config_of(tmp_path, "lora.enabled=true"), None, None)  # type: ignore[arg-type]
    with supervision._dropout_masks(SimpleNamespace(world=world, step=0), "dit", 0):  # type: ignore[arg-type]
        assert torch.equal(torch.rand(4), expected)


DROPOUT = ["training.use_reward=false", "training.batch_size=1", "training.gradient_accumulation_steps=2"]
DROPOUT += ["lora.enabled=true", "lora.rank=2"]


@dataclass
class Masks:
    """The mask that each term of a step would be given, in their order, and whether the global generator came out of
    the step as it went in."""

    trainer: SupervisedTrainer
    given: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)
    undisturbed: bool = True

    def __post_init__(self) -> None:
        def noting(part, batch):
            self.given.append((part.name, tuple(torch.nn.functional.dropout(torch.ones(64)).tolist())))
            return MethodLoss(0 * next(iter(part.parameters.values())).sum(), 1, {})

        self.trainer.supervision.terms.loss = noting  # type: ignore[method-assign]

    def of(self, step: int = 0, rank: int = 0, others: int = 0, **keys: object) -> dict[str, list[tuple[float, ...]]]:
        """Those of both chunks, by half, after the process has drawn other numbers; `keys` of the configuration."""
        self.trainer.step, self.trainer.world = step, World(rank)
        self.trainer.supervision.config = self.trainer.config.model_copy(update=keys)
        self.given.clear()
        torch.manual_seed(others)
        before = torch.random.get_rng_state()
        self.trainer.training_step()
        self.undisturbed = torch.equal(torch.random.get_rng_state(), before)
        return {half: [mask for name, mask in self.given if name == half] for half in ("ar", "dit")}


def test_every_term_has_a_dropout_mask_of_its_own_that_its_place_in_the_run_names(tmp_path):
    """Two steps, processes, halves and chunks: 16 masks, and the same again whatever the process has drawn besides."""
    masks = Masks(trainer_of(tmp_path, *DROPOUT, "lora.dropout=0.5"))
    places = [(step, rank) for step in (0, 1) for rank in (0, 1)]
    first = {place: masks.of(*place) for place in places}
    every = [mask for found in first.values() for half in found.values() for mask in half]
    assert len(every) == len(set(every)) == 16
    for place in reversed(places):
        assert masks.of(*place, others=7) == first[place], place
        assert masks.undisturbed
    assert not set(every) & {mask for half in masks.of(seed=4).values() for mask in half}
    lora = masks.trainer.config.lora
    for half, other in (("ar", "dit"), ("dit", "ar")):  # where the other has no dropout
        one = lora.model_copy(update={other: getattr(lora, other).model_copy(update={"dropout": 0.0})})
        assert masks.of(others=7, lora=one)[half] == first[0, 0][half], half
