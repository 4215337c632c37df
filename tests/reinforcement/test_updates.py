"""From scored rollouts to optimizer steps, on a policy of one weight whose gradients can be computed apart."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from glm_training.algorithms.awm import matching_log_density
from glm_training.algorithms.dgpo import group_preference_loss
from glm_training.algorithms.nft import nft_loss
from glm_training.algorithms.policy_loss import policy_loss
from glm_training.engine.parts import Part
from glm_training.methods.awm import AWM
from glm_training.methods.dgpo import DGPO
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.nft import NFT
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.reinforcement import updates
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.rollout import rollout_settings
from glm_training.rewards import RewardResult
from glm_training.utils.distributed import World
from glm_training.utils.randomness import normal
from tests.methods.toys import SCHEDULE, ToyVelocity, prompt_of, trajectory_of
from tests.runs import config_of

DIT = ["model.component=dit", "reward.grpo.num_samples=2", "training.learning_rate=0.1"]
POSITIONS = [4, 7]
FINALS = torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]], [[-1.0, 0.5]], [[0.25, 2.0]]]).view(4, 1, 1, 2)
ADVANTAGES = torch.tensor([1.0, -3.0, 0.5, 2.0])
WEIGHT, OLD = 0.7, 0.4


def dit_run(tmp_path, *overrides: str, step: int = 0):
    """Two chunks of a prompt with two renders each, and what an update needs of the run."""
    config = config_of(tmp_path, *DIT, *overrides)
    toy = ToyVelocity(WEIGHT)
    part = Part("dit", toy, dict(toy.named_parameters()), config.optimizer_for("dit"), World(), total_steps=10)
    run = updates.Learning(
        config,
        World(),
        {"dit": part},
        rollout_settings(config),
        step,
        nullcontext,
        lambda: None,
        lambda p: p.step(step),
    )
    chunks = []
    for i, position in enumerate(POSITIONS):
        renders = trajectory_of(FINALS[2 * i : 2 * i + 2], guidance_scale=2.0)
        rollout = SimpleNamespace(prompts=["a"], positions=[position], renders=renders, plans=[None])
        scored = Scored(rollout, RewardResult(torch.zeros(2), {}), i)  # type: ignore[arg-type]
        scored.render_advantages = ADVANTAGES[2 * i : 2 * i + 2]
        chunks.append(scored)
    return run, part, chunks


def noised(run, level: int):
    """(noisy, noise, sigma, velocity of a weight): noise is named by level, position and place in the group."""
    names = [(position, place) for position in POSITIONS for place in (0, 1)]
    noise = normal(run.config.seed, f"nft/{level}", names, (1, 1, 2))
    sigma = SCHEDULE.sigmas[level]
    noisy = (1 - sigma) * FINALS + sigma * noise
    return noisy, noise, sigma, lambda weight: weight * noisy + SCHEDULE.timesteps[level] / 1000


def test_an_nft_update_is_the_mean_over_all_rows_and_levels(tmp_path):
    run, part, chunks = dit_run(tmp_path, "reward.grpo.dit.method=nft", "reward.grpo.dit.old_decay=0.25")
    part.old = ParameterSnapshot(part.parameters)
    part.old.state_dict()["weight"].fill_(OLD)
    updates.update_dit(run, NFT(0.5, 2.0, 0.0), chunks)
    weight = torch.tensor(WEIGHT, requires_grad=True)
    for level in range(3):
        noisy, _, sigma, velocity = noised(run, level)
        options = {"beta": 0.5, "advantage_max": 2.0}
        nft = nft_loss(velocity(weight), velocity(OLD), noisy, FINALS, sigma, ADVANTAGES, **options)
        (nft.loss / 3).backward()
    assert part.component.weight.item() == pytest.approx(WEIGHT - 0.1 * weight.grad.item(), rel=1e-5)
    assert abs(weight.grad) > 1e-3
    moved = part.component.weight.item()
    assert part.old.state_dict()["weight"].item() == pytest.approx(0.25 * OLD + 0.75 * moved, rel=1e-5)


def test_awms_second_update_compares_with_the_policy_that_drew(tmp_path):
    """The first update has the first sample of each prompt, the second one the others, under the moved weight."""
    keys = ["reward.grpo.dit.method=awm", "reward.grpo.updates_per_rollout=2", "reward.grpo.dit.timesteps_per_sample=2"]
    run, part, chunks = dit_run(tmp_path, *keys, "rollout.micro_batch_size=1")
    updates.update_dit(run, AWM((0.9, 9.0), 0.0), chunks)
    levels, weight = updates._levels(run), WEIGHT
    for update in (0, 1):
        own, rows = torch.tensor(weight, requires_grad=True), [update, 2 + update]
        for level in levels:
            _, noise, _, velocity = noised(run, level)
            density, drew = (matching_log_density(velocity(w), FINALS, noise) for w in (own, torch.tensor(WEIGHT)))
            loss = policy_loss(density[rows, None], drew[rows, None], ADVANTAGES[rows], clip=(0.9, 9.0)).loss
            (loss / 2).backward()
        weight -= 0.1 * own.grad.item()
    assert part.component.weight.item() == pytest.approx(weight, rel=1e-5)
    assert abs(weight - WEIGHT) > 1e-3


def test_dgpo_keeps_the_renders_of_a_plan_together_and_gives_them_one_noise(tmp_path):
    """Update k has the prompt k, both renders of it, compared with each other."""
    keys = ["reward.grpo.dit.method=dgpo", "reward.grpo.updates_per_rollout=2", "rollout.micro_batch_size=2"]
    run, part, chunks = dit_run(tmp_path, *keys)
    part.reference = lambda: part.component.at(OLD)
    updates.update_dit(run, DGPO(0.5, (0.9, 9.0), 0.0), chunks)
    weight = WEIGHT
    for update, position in enumerate(POSITIONS):
        own, rows = torch.tensor(weight, requires_grad=True), slice(2 * update, 2 * update + 2)
        for level in range(3):
            noise = normal(run.config.seed, f"nft/{level}", [(position, 0)] * 2, (1, 1, 2))
            noisy = (1 - SCHEDULE.sigmas[level]) * FINALS[rows] + SCHEDULE.sigmas[level] * noise
            errors = [
                (w * noisy + SCHEDULE.timesteps[level] / 1000 - (noise - FINALS[rows])).square().mean(dim=(1, 2, 3))
                for w in (own, torch.tensor(OLD))
            ]
            loss = group_preference_loss(*errors, ADVANTAGES[rows], torch.zeros(2, dtype=torch.long), beta=0.5).loss
            (loss / 3).backward()
        weight -= 0.1 * own.grad.item()
    assert part.component.weight.item() == pytest.approx(weight, rel=1e-5)
    assert abs(weight - WEIGHT) > 1e-3


def test_gradients_are_exchanged_at_the_last_term_of_each_update(tmp_path):
    keys = ["reward.grpo.dit.method=awm", "reward.grpo.updates_per_rollout=2", "rollout.micro_batch_size=1"]
    run, part, chunks = dit_run(tmp_path, *keys)
    asked = []
    part.accumulating = lambda last: asked.append(last) or nullcontext()  # type: ignore[method-assign]
    updates.update_dit(run, AWM((0.9, 9.0), 0.0), chunks)
    assert asked == [*[False] * 5, True] * 2, "two rows at three levels, twice"


def test_noise_levels_are_chosen_anew_at_each_step(tmp_path):
    keys = ["reward.grpo.dit.method=nft", "reward.grpo.dit.timesteps_per_sample=1"]
    chosen = [updates._levels(dit_run(tmp_path, *keys, step=step)[0]) for step in range(30)]
    assert {levels for levels in chosen} == {(0,), (1,), (2,)}
    run = dit_run(tmp_path, "reward.grpo.dit.method=nft", "reward.grpo.dit.timesteps_per_sample=2")[0]
    assert len(set(updates._levels(run))) == 2 and list(updates._levels(run)) == sorted(updates._levels(run))
    assert updates._levels(dit_run(tmp_path, "reward.grpo.dit.method=nft")[0]) == (0, 1, 2)
    noisy = dit_run(tmp_path, "reward.grpo.dit.method=dgpo", "reward.grpo.dit.noisiest_share=0.5")[0]
    assert updates._levels(noisy) == (0, 1), "half of three levels, rounded up, from the noisiest on"
    steps = ["reward.grpo.dit.method=dgpo", "model.dit.num_inference_steps=25"]
    for share, levels in ((0.28, 7), (0.29, 8), (1e-12, 1), (1, 25)):
        found = updates._levels(dit_run(tmp_path, *steps, f"reward.grpo.dit.noisiest_share={share}")[0])
        assert found == tuple(range(levels)), "whole shares exactly, others rounded up, at least one"


def test_the_ar_half_is_held_to_the_reference_of_the_same_rows(tmp_path):
    """Row r of chunk c has the reference log-prob of its own tokens, in slices too."""
    keys = ["model.component=ar", "reward.grpo.num_samples=3", "rollout.micro_batch_size=2"]
    config = config_of(tmp_path, *keys)
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    module = torch.nn.Module()
    module.weight = weight
    part = Part("ar", module, {"weight": weight}, config.optimizer_for("ar"), World(), total_steps=10)
    inside = []

    @contextmanager
    def reference():
        inside.append(True)
        yield
        inside.pop()

    part.reference = reference
    seen = []

    class Method:
        terms, kl_coef = 1, 0.1

        def row_weight(self, prompt):
            return 1.0

        def score(self, policy, rollout):
            assert inside and not torch.is_grad_enabled()
            return rollout.tokens * 10.0

        def losses(self, policy, rollout, advantages, anchor, **_):
            seen.append((rollout.tokens[:, 0].tolist(), advantages.tolist(), anchor[:, 0].tolist()))
            yield updates.MethodLoss(weight.sum() * 0, len(anchor), {})

    chunks = []
    for i in range(2):
        tokens = torch.arange(3 * i, 3 * i + 3)[:, None].repeat(1, 6)
        plans = ARRollout(prompt_of(3), tokens, torch.zeros(3, 6), None, 1.0)
        rollout = SimpleNamespace(prompts=["a"], positions=[i], plans=plans)
        scored = Scored(rollout, RewardResult(torch.zeros(3), {}), i)  # type: ignore[arg-type]
        scored.plan_advantages = tokens[:, 0] / 2
        chunks.append(scored)
    run = updates.Learning(
        config, World(), {"ar": part}, rollout_settings(config), 0, nullcontext, lambda: None, lambda p: p.step(0)
    )
    updates.update_ar(run, Method(), chunks)  # type: ignore[arg-type]
    assert [rows for rows, _, _ in seen] == [[0, 1], [2], [3, 4], [5]]
    for rows, advantages, anchors in seen:
        assert anchors == [10 * row for row in rows] and advantages == [row / 2 for row in rows]


@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        # of a token of the image of six, and of those of four; one of the full size has 16 x 16 and 8 x 8
        ("sequence_mean", (1 / 3 / 6, 1 / 3 / 4)),
        ("token_mean", (1 / (6 + 2 * 4), 1 / (6 + 2 * 4))),
        ("token_mean, preview_weight=0.5", (1 / (2 * 0.5 + 4 + 2 * 4), 1 / (2 * 0.5 + 4 + 2 * 4))),
        ("constant", (1 / 3 / 320, 1 / 3 / 320)),
    ],
)
def test_plans_of_two_sizes_count_as_the_aggregation_says(tmp_path, aggregation, shares):
    """A chunk of a plan of six tokens and one of two plans of four; the log-prob of a token t is w t / 10, so that the
    gradient at ratio 1 is minus the sum of A t / 10 by the shares."""
    name, *more = aggregation.split(", ")
    keys = [f"reward.grpo.loss_aggregation={name}", *(f"reward.grpo.ar.{key}" for key in more)]
    sizes = ["model.component=ar", "reward.grpo.num_samples=2", "training.learning_rate=0.1", "reward.grpo.kl_coef=0"]
    config = config_of(tmp_path, *sizes, *keys, "data.image_size={height: 256, width: 256}")
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(WEIGHT))
    module.forward = lambda prompt, tokens, **_: module.weight * tokens / 10
    part = Part("ar", module, {"weight": module.weight}, config.optimizer_for("ar"), World(), total_steps=10)
    chunks, wanted = [], 0.0
    for i, (rows, length) in enumerate(((1, 6), (2, 4))):
        tokens = torch.arange(1, rows * length + 1).view(rows, length)
        plans = ARRollout(prompt_of(rows, preview=length == 6), tokens, WEIGHT * tokens / 10, None, 1.0)
        rollout = SimpleNamespace(prompts=["a"] * rows, positions=[i], plans=plans)
        scored = Scored(rollout, RewardResult(torch.zeros(rows), {}), i)  # type: ignore[arg-type]
        scored.plan_advantages = torch.tensor([1.0, -2.0])[:rows] + i
        chunks.append(scored)
        of_tokens = torch.ones(length)
        of_tokens[: plans.prompt.preview_length] = 0.5 if more else 1.0
        wanted -= shares[i] * (scored.plan_advantages[:, None] * of_tokens * tokens / 10).sum().item()
    settings = replace(rollout_settings(config), plans=1)
    run = updates.Learning(config, World(), {"ar": part}, settings, 0, nullcontext, lambda: None, lambda p: p.step(0))
    figures = updates.update_ar(run, updates.ar_method(config), chunks)
    assert part.component.weight.item() == pytest.approx(WEIGHT - 0.1 * wanted, rel=1e-5)
    assert abs(wanted) > 1e-3 and figures["ar/clip_fraction"] == 0


# -- what the configuration says ---------------------------------------------------------------------------------------


def test_the_ar_half_learns_as_the_configuration_says(tmp_path):
    keys = {
        "clip_range": 0.1,
        "clip_range_high": 0.3,
        "kl_coef": 0.02,
        "ratio_level": "sequence",
        "loss_aggregation": "constant",
        "ar.entropy_coef": 0.04,
        "ar.preview_weight": 0.25,
        "ar.large_weight": 2.0,
    }
    method = updates.ar_method(config_of(tmp_path, *(f"reward.grpo.{key}={value}" for key, value in keys.items())))
    assert (method.clip, method.kl_coef, method.level, method.aggregation) == ((0.1, 0.3), 0.02, "sequence", "constant")
    assert (method.entropy_coef, method.preview_weight, method.large_weight) == (0.04, 0.25, 2.0)
    assert method.objective == "ppo"
    capped = updates.ar_method(config_of(tmp_path, "reward.grpo.ar.objective=cispo", "reward.grpo.ar.cispo_cap=3"))
    assert (capped.objective, capped.clip) == ("cispo", (0.0, 3.0))


def test_the_dit_half_learns_as_the_configuration_says(tmp_path):
    shared = ["reward.grpo.dit.clip_range=0.1", "reward.grpo.dit.clip_range_high=0.3", "reward.grpo.dit.kl_coef=0.02"]

    def method(*keys: str):
        return updates.dit_method(config_of(tmp_path, *shared, *(f"reward.grpo.dit.{key}" for key in keys)))

    assert method() == FlowPolicyGradient((0.1, 0.3), 0.02, False, None)
    assert method("ratio=guard") == FlowPolicyGradient((0.1, 0.3), 0.02, True, None)
    assert method("noise_weighting=true", "kl_form=velocity") == FlowPolicyGradient(
        (0.1, 0.3), 0.02, noise_weighting=True, kl_form="velocity"
    )
    assert method("divergence_threshold=0.5") == FlowPolicyGradient((0.1, 0.3), 0.02, False, 0.5)
    assert method("method=nft", "nft_beta=0.4", "advantage_max=3") == NFT(0.4, 3.0, 0.02)
    assert method("method=dgpo", "dgpo_beta=10") == DGPO(10.0, (0.1, 0.3), 0.02)
    assert method("method=awm", "huber=0.2") == AWM((0.1, 0.3), 0.02, 0.2)
