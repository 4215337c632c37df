"""Preference losses on the real components: where they start, what they depend on, what they do to both images."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from glm_training.methods.preference import (
    DiffusionFinetuning,
    DiffusionPreference,
    Policies,
    SequencePreference,
    errors,
    sequence_log_probs,
)
from glm_training.models.glm_image.family import DiTDenoiser, GLMImage
from glm_training.models.lora import adapter_parameters, adapters_disabled, add_lora
from glm_training.models.sdxl.denoiser import UNetDenoiser
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.types import SDXLText, UNetCondition, add_time_ids
from glm_training.models.snapshot import ParameterSnapshot

PAIRS = ["a red circle", "a cat"]
LN2 = math.log(2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A family's denoiser with two pairs and their draws."""

    def __init__(self, kind: str) -> None:
        if kind == "unet":
            family = SDXL.load("tiny-random")
            self.component, self.module = family.unet, family.unet.unet
            self.denoiser = UNetDenoiser(family.unet.schedule)
            self.targets = family.unet.lora_targets
        else:
            family = GLMImage.load("tiny-random")
            self.component, self.module = family.dit, family.dit.transformer
            self.denoiser = DiTDenoiser(family.dit, 64, 64)
            self.targets = family.dit.lora_targets
        self.kind = kind
        self.condition = self.condition_of(PAIRS)
        shape = self.component.latent_shape(64, 64)
        self.clean, self.noise = draw(4, *shape, seed=1), draw(2, *shape, seed=2)
        self.levels = self.denoiser.levels(torch.tensor([0.3, 0.8]))

    def condition_of(self, prompts):
        if self.kind == "unet":
            text = self.component.encode_prompts(prompts)
            ids = add_time_ids((64, 64), [(0, 0), (0, 3), (0, 0), (1, 0)], (64, 64))
            return UNetCondition(SDXLText.cat([text, text]), ids)
        tokens = torch.randint(0, 64, (4, 4), generator=torch.Generator().manual_seed(3))
        return self.component.condition(prompts * 2, tokens, (2, 2))

    def adapt(self) -> None:
        add_lora(self.module, self.targets, rank=2, alpha=4)

    def move(self) -> None:
        """The trained parameters away from where they started."""
        for i, param in enumerate(p for p in self.module.parameters() if p.requires_grad):
            param.data.add_(0.05 * draw(*param.shape, seed=i))

    @property
    def policies(self) -> Policies:
        return Policies(self.component, self.component, partial(adapters_disabled, self.module))

    def loss(self, method: DiffusionPreference, policies: Policies | None = None, **changed):
        given = {"clean": self.clean, "condition": self.condition, "noise": self.noise, "levels": self.levels}
        return method.loss(policies or self.policies, **(given | changed))


@pytest.fixture(params=["unet", "dit"])
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture
def unet() -> Case:
    return Case("unet")


# -- denoisers ---------------------------------------------------------------------------------------------------------


def test_fresh_adapters_start_at_ln_2(case) -> None:
    case.adapt()
    case.component.train()
    for gradient_checkpointing in (False, True):
        if gradient_checkpointing:
            case.component.enable_gradient_checkpointing()
        term = case.loss(DiffusionPreference(case.denoiser, 5000.0))
        assert abs(term.loss.item() - LN2) <= 1e-6 and term.rows == 2
        assert (term.metrics["accuracy"], term.metrics["margin"]) == (0.5, 0)
        assert term.metrics["chosen_change"] == term.metrics["rejected_change"] == 0
        term.loss.backward()
        gradients = [param.grad for name, param in adapter_parameters(case.module).items() if "lora_B" in name]
        assert any(grad is not None and grad.abs().max() > 0 for grad in gradients), "ln 2 is no minimum"


def test_full_weights_start_at_ln_2_against_their_snapshot(case) -> None:
    case.module.requires_grad_(True)
    snapshot = ParameterSnapshot(dict(case.module.named_parameters()))
    policies = Policies(case.component, case.component, snapshot.applied)
    method = DiffusionPreference(case.denoiser, 50.0)
    assert abs(case.loss(method, policies).loss.item() - LN2) <= 1e-6
    case.move()
    term = case.loss(method, policies)
    assert abs(term.loss.item() - LN2) > 1e-3
    term.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in case.module.parameters() if p.grad is not None)


def test_the_loss_is_the_formula_of_its_errors(case) -> None:
    case.adapt()
    case.move()
    term = case.loss(DiffusionPreference(case.denoiser, 3.0))
    with torch.no_grad():
        margins, found = [], []
        for row in range(2):
            gained = []
            for image in (row, row + 2):
                one = [image]
                level = case.levels.select(slice(row, row + 1))
                clean, noise = case.clean[one], case.noise[[row]]
                a, b = level.signal.view(1, 1, 1, 1), level.spread.view(1, 1, 1, 1)
                target = noise if case.kind == "unet" else noise - clean
                noisy, condition = a * clean + b * noise, case.condition.select(torch.tensor(one))
                ours = case.denoiser.predict(case.component, noisy, level, condition)
                with adapters_disabled(case.module):
                    theirs = case.denoiser.predict(case.component, noisy, level, condition)
                gained.append(((ours - target) ** 2).mean() - ((theirs - target) ** 2).mean())
                found.append(((ours - target) ** 2).mean())
            margins.append(-1.5 * (gained[0] - gained[1]))
    wanted = torch.stack(margins)
    torch.testing.assert_close(term.metrics["margin"], wanted.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(term.loss.detach(), -torch.nn.functional.logsigmoid(wanted).mean(), atol=1e-5, rtol=0)
    assert term.metrics["accuracy"] == (wanted > 0).float().mean()
    torch.testing.assert_close(term.metrics["chosen_error"], (found[0] + found[2]) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(term.metrics["rejected_error"], (found[1] + found[3]) / 2, atol=1e-4, rtol=1e-4)


def test_a_pair_shares_noise_and_level_in_one_forward(case) -> None:
    case.adapt()
    calls = []

    def spy(noisy, timestep, *rest, **named):
        calls.append((noisy.detach(), timestep, torch.is_grad_enabled()))
        return case.component(noisy, timestep, *rest, **named)

    case.loss(DiffusionPreference(case.denoiser, 1.0), Policies(spy, spy, nullcontext))
    assert [grad for _, _, grad in calls] == [False, True], "one forward of the reference, one of the trained network"
    a, b = (x.repeat(2).view(4, 1, 1, 1) for x in (case.levels.signal, case.levels.spread))
    for noisy, timestep, _ in calls:
        assert torch.equal(timestep[:2], timestep[2:]) and torch.equal(timestep[:2], case.levels.timestep)
        noise = (noisy - a * case.clean) / b
        torch.testing.assert_close(noise[:2], noise[2:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(noise[:2], case.noise, atol=1e-5, rtol=1e-5)


def test_prompts_change_the_loss(unet) -> None:
    unet.adapt()
    unet.move()
    method = DiffusionPreference(unet.denoiser, 100.0)
    before = unet.loss(method).loss
    other = unet.loss(method, condition=unet.condition_of(["a blue square", "a cat"])).loss
    assert (before - other).abs() > 1e-4


def test_tokens_and_quoted_words_change_the_loss() -> None:
    case = Case("dit")
    case.adapt()
    case.move()
    method = DiffusionPreference(case.denoiser, 100.0)
    before = case.loss(method).loss
    assert (before - case.loss(method, condition=case.condition_of(['a sign "OPEN"', "a cat"])).loss).abs() > 1e-4
    swapped = case.condition.select(torch.tensor([2, 1, 0, 3]))
    assert (before - case.loss(method, condition=swapped).loss).abs() > 1e-4


def test_switched_off_adapters_are_a_frozen_copy(case) -> None:
    frozen = copy.deepcopy(case.component)
    case.adapt()
    case.move()
    method = DiffusionPreference(case.denoiser, 100.0)
    separate = Policies(case.component, frozen, nullcontext)
    assert torch.equal(case.loss(method).loss, case.loss(method, separate).loss)


def test_a_step_prefers_the_chosen_image(case) -> None:
    case.adapt()
    method, params = DiffusionPreference(case.denoiser, 50.0), list(adapter_parameters(case.module).values())
    optimizer = torch.optim.Adam(params, lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        term = case.loss(method)
        term.loss.backward()
        optimizer.step()
    metrics = case.loss(method).metrics
    assert metrics["accuracy"] == 1 and metrics["margin"] > 0.5 and term.loss < LN2 / 1.5
    assert metrics["chosen_change"] < metrics["rejected_change"]


def test_min_snr_weights_the_pairs(unet) -> None:
    unet.adapt()
    unet.move()
    late = {"levels": unet.denoiser.at(torch.tensor([10, 10]))}
    plain = unet.loss(DiffusionPreference(unet.denoiser, 1.0), **late).metrics["margin"]
    weighted = unet.loss(DiffusionPreference(unet.denoiser, 1.0, min_snr_gamma=5.0), **late).metrics["margin"]
    snr = late["levels"].snr()[0]
    assert snr > 5
    torch.testing.assert_close(weighted, plain * 5 / snr)


def test_finetuning_looks_at_the_preferred_images_alone(case) -> None:
    clean, condition = case.clean[:2], case.condition.select(torch.arange(2))
    given = {"noise": case.noise, "levels": case.levels}
    term = DiffusionFinetuning(case.denoiser).loss(case.component, clean, condition, **given)
    found = errors(case.denoiser, case.component, clean, condition, **given)
    assert torch.equal(term.loss, found.mean()) and term.rows == 2 and set(term.metrics) == {"chosen_error"}
    if case.kind == "unet":
        weighted = DiffusionFinetuning(case.denoiser, 5.0).loss(case.component, clean, condition, **given)
        weights = (5 / case.levels.snr()).clamp(max=1)
        torch.testing.assert_close(weighted.loss, (found * weights).mean())


def test_draws_that_do_not_fit_the_images_are_refused(unet) -> None:
    for noise, levels in ((unet.noise, unet.levels.select(slice(1))), (unet.noise[[0, 0, 1]], unet.levels)):
        with pytest.raises(ValueError, match="do not serve 4 images"):
            unet.loss(DiffusionPreference(unet.denoiser, 1.0), noise=noise, levels=levels)


# -- sequences ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sequences():
    family = GLMImage.load("tiny-random")
    prompt = family.ar.encode_prompts(["a red circle", "a sign"], 64, 64).select(torch.tensor([0, 1, 0, 1]))
    tokens = torch.randint(0, 64, (4, prompt.T), generator=torch.Generator().manual_seed(0))
    return family.ar, prompt, tokens


def test_sequences_start_at_ln_2(sequences) -> None:
    ar, prompt, tokens = sequences
    reference = sequence_log_probs(ar, prompt, tokens)
    assert reference.shape == (4,) and not reference.requires_grad
    term = SequencePreference(0.1).loss(ar, prompt, tokens, reference)
    assert abs(term.loss.item() - LN2) <= 1e-6 and term.rows == 2 and term.metrics["margin"] == 0
    assert abs(term.metrics["chosen_error"] - math.log(1024)) < 3, "nats per token"


def test_sequences_follow_the_formula_and_the_prompt(sequences) -> None:
    ar, prompt, tokens = sequences
    reference = sequence_log_probs(ar, prompt, tokens)
    with torch.no_grad():
        head = ar.model.lm_head.weight
        head.add_(0.3 * head.std() * draw(*head.shape, seed=1))
    term = SequencePreference(0.1).loss(ar, prompt, tokens, reference)
    moved = ar(prompt, tokens).detach().sum(1) - reference
    margins = 0.1 * (moved[:2] - moved[2:])
    torch.testing.assert_close(term.loss.detach(), -torch.nn.functional.logsigmoid(margins).mean())
    assert term.metrics["accuracy"] == (margins > 0).float().mean()
    torch.testing.assert_close(term.metrics["chosen_change"], -moved[:2].mean() / prompt.T)
    other = ar.encode_prompts(["a blue square", "a sign"], 64, 64).select(torch.tensor([0, 1, 0, 1]))
    assert (SequencePreference(0.1).loss(ar, other, tokens, reference).loss - term.loss).abs() > 1e-3


def test_sequences_learn_to_prefer(sequences) -> None:
    ar, prompt, tokens = sequences
    ar.requires_grad_(False)
    ar.model.lm_head.requires_grad_(True)
    reference = sequence_log_probs(ar, prompt, tokens)
    optimizer = torch.optim.Adam(ar.model.lm_head.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        SequencePreference(0.1).loss(ar, prompt, tokens, reference).loss.backward()
        optimizer.step()
    metrics = SequencePreference(0.1).loss(ar, prompt, tokens, reference).metrics
    assert metrics["accuracy"] == 1 and metrics["chosen_change"] < metrics["rejected_change"]
