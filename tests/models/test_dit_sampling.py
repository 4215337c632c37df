"""Sampling and replay go through one velocity: what sampled is what is scored."""

import dataclasses

import pytest
import torch

from glm_training.algorithms.flow_sde import sde_step
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.tiny import build_tiny

GRID, STEPS = (2, 2), 4
METHOD = FlowPolicyGradient(clip=(1e-4, 1e-4), kl_coef=0.0)
PROMPTS = ['a "sign"', "plain", 'longer "words here"']


@pytest.fixture(scope="module")
def dit() -> DiTComponent:
    pipe = build_tiny()
    return DiTComponent(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(dit: DiTComponent, *, kernel="flow", indices=(0, 2), guidance_scale=1.5, store=True, source=False, **options):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 64, (3, 4), generator=generator)
    sources = {}
    if source:
        sources = {"sources": torch.rand(3, 3, 64, 64, generator=generator), "source_tokens": tokens.flip(0)}
    condition = dit.condition(PROMPTS, tokens, GRID, **sources)
    return dit.sample(
        rand(3, 4, 8, 8),
        condition,
        dit.schedule(STEPS, 64, 64),
        guidance_scale=guidance_scale,
        kernel=kernel,
        eta=0.5,
        sde_indices=indices,
        step_noise=rand(len(indices), 3, 4, 8, 8, seed=1) if indices else None,
        store=store,
        **options,
    )


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("kernel", ["flow", "dance", "cps"])
def test_replay_gives_the_rollouts_log_probs(dit, kernel, guidance_scale, source):
    trajectory = run(dit, kernel=kernel, guidance_scale=guidance_scale, source=source)
    for column, step in enumerate(trajectory.sde_indices):
        whole = METHOD.replay(dit, trajectory, step)
        assert whole.log_prob.requires_grad
        assert ((whole.log_prob - trajectory.log_probs[:, column]).exp() - 1).abs().max() <= 1e-5
        rows = torch.tensor([2, 0])
        part = METHOD.replay(dit, trajectory.select(rows), step)
        assert ((part.log_prob - trajectory.log_probs[rows, column]).exp() - 1).abs().max() <= 1e-5
        assert torch.equal(part.next_latents, trajectory.at(step + 1)[rows])


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"kernel": "dance"}, {"eta": 0.6}])
def test_replay_with_anything_else_is_seen(dit, change):
    trajectory = run(dit)
    altered = dataclasses.replace(trajectory, **change)
    deviation = (METHOD.replay(dit, altered, 2).log_prob - trajectory.log_probs[:, 1]).exp() - 1
    assert deviation.abs().max() > 1e-4


def test_replay_gradient_reaches_the_transformer(dit):
    trajectory = run(dit)
    dit.zero_grad()
    METHOD.replay(dit, trajectory, 2).log_prob.sum().backward()
    assert dit.transformer.proj_out.weight.grad.abs().max() > 0
    dit.zero_grad()


def test_steps_follow_the_formulas(dit):
    """SDE steps by `sde_step` with the given noise, the others by Euler."""
    trajectory = run(dit, indices=(0, 1))
    schedule, condition = trajectory.schedule, trajectory.condition
    latents = rand(3, 4, 8, 8)
    noises = rand(2, 3, 4, 8, 8, seed=1)
    with torch.no_grad():
        for step in range(STEPS):
            times = schedule.timesteps[step].expand(3)
            velocity = dit(latents, times, condition, guidance_scale=1.5)
            now, after = schedule.sigmas[step], schedule.sigmas[step + 1]
            if step < 2:
                assert torch.equal(trajectory.at(step), latents)
                taken = sde_step(
                    latents,
                    velocity,
                    now,
                    after,
                    kernel="flow",
                    eta=0.5,
                    sigma_max=schedule.sigmas[1],
                    noise=noises[step],
                )
                torch.testing.assert_close(taken.log_prob, trajectory.log_probs[:, step])
                latents = taken.next_latents
            else:
                latents = latents + (after - now) * velocity
    torch.testing.assert_close(trajectory.final, latents)


def test_store_keeps_both_ends_of_each_sde_step_and_no_more(dit):
    trajectory = run(dit, indices=(0, 2))
    assert trajectory.stored_steps == (0, 1, 2, 3) and trajectory.stored.shape == (3, 4, 4, 8, 8)
    last = run(dit, indices=(3,))
    assert last.stored_steps == (3, 4) and torch.equal(last.at(4), last.final)
    assert METHOD.replay(dit, last, 3).log_prob.shape == (3,)
    every = run(dit, indices=(0, 1, 2, 3))
    assert every.latents.shape == (3, STEPS + 1, 4, 8, 8)
    assert torch.equal(every.latents[:, 0], rand(3, 4, 8, 8)) and torch.equal(every.latents[:, -1], every.final)
    with pytest.raises(ValueError, match="use at"):
        _ = last.latents
    with pytest.raises(ValueError, match="drew no noise"):
        METHOD.replay(dit, trajectory, 1)
    bare = run(dit, store=False)
    assert bare.stored is None and torch.equal(bare.final, trajectory.final)
    with pytest.raises(ValueError, match="store=True"):
        METHOD.replay(dit, bare, 0)


@pytest.mark.parametrize("source", [False, True])
def test_micro_batches_change_nothing(dit, source):
    whole = run(dit, source=source)
    for size in (1, 2):
        parts = run(dit, source=source, micro_batch_size=size)
        torch.testing.assert_close(parts.final, whole.final, atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.log_probs, whole.log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.stored, whole.stored, atol=1e-5, rtol=0)
        assert parts.condition.batch_size == 3


def test_ode_draws_nothing(dit):
    ode = run(dit, kernel="ode", indices=())
    assert ode.log_probs.shape == (3, 0) and ode.stored is None
    unused = run(dit, kernel="flow", indices=())
    assert torch.equal(ode.final, unused.final)
    assert not torch.equal(ode.final, run(dit).final)


def test_wrong_settings_are_named(dit):
    with pytest.raises(ValueError, match="ascending"):
        run(dit, indices=(2, 0))
    with pytest.raises(ValueError, match="ascending"):
        run(dit, indices=(STEPS,))
    with pytest.raises(ValueError, match="stochastic kernel"):
        run(dit, kernel="ode", indices=(0,))
    with pytest.raises(ValueError, match="step_noise must be"):
        condition = dit.condition(PROMPTS, torch.zeros(3, 4, dtype=torch.long), GRID)
        schedule = dit.schedule(STEPS, 64, 64)
        dit.sample(rand(3, 4, 8, 8), condition, schedule, guidance_scale=1.0, kernel="flow", sde_indices=(0,))


def test_non_finite_result_is_an_error(dit):
    condition = dit.condition(PROMPTS, torch.zeros(3, 4, dtype=torch.long), GRID)
    with pytest.raises(FloatingPointError, match="not finite"):
        dit.sample(rand(3, 4, 8, 8) * float("nan"), condition, dit.schedule(2, 64, 64), guidance_scale=1.0)


def test_the_step_hook_sees_every_step_of_every_micro_batch_and_can_stop(dit):
    condition = dit.condition(PROMPTS, torch.zeros(3, 4, dtype=torch.long), GRID)
    steps = []
    options = {"guidance_scale": 1.0, "micro_batch_size": 2}
    dit.sample(rand(3, 4, 8, 8), condition, dit.schedule(3, 64, 64), **options, on_step=steps.append)
    assert steps == [0, 1, 2, 0, 1, 2]

    def stop(step):
        raise KeyboardInterrupt

    dit.transformer.train()
    with pytest.raises(KeyboardInterrupt):
        dit.sample(rand(3, 4, 8, 8), condition, dit.schedule(3, 64, 64), **options, on_step=stop)
    assert dit.transformer.training
    dit.eval()


@pytest.mark.parametrize("branches", [1, 3])
def test_nothing_is_dropped_out_while_drawing_and_the_mode_of_before_comes_back(dit, branches):
    modes = []
    handle = dit.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    condition = dit.condition(PROMPTS, torch.zeros(3, 4, dtype=torch.long), GRID)
    noise = {"kernel": "flow", "sde_indices": (1,), "step_noise": rand(1, 3, 4, 8, 8)}
    try:
        for training in (True, False):
            dit.train(training)
            dit.sample(
                rand(3, 4, 8, 8), condition, dit.schedule(2, 64, 64), guidance_scale=1.0, branches=branches, **noise
            )
            assert dit.transformer.training is training and not dit.vae.training
    finally:
        handle.remove()
        dit.eval()
    assert modes == [False] * 4


def test_sources_are_read_without_noise_without_words_and_with_their_tokens(dit):
    """What the transformer is asked in the pass that makes a source's keys."""
    asked = []
    handle = dit.transformer.register_forward_pre_hook(lambda _, __, named: asked.append(named), with_kwargs=True)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    condition = dit.condition(["x"], torch.zeros(1, 4, dtype=torch.long), GRID, torch.rand(1, 3, 64, 96), tokens)
    try:
        dit.reference_keys(condition.source)
    finally:
        handle.remove()
    (named,) = asked
    assert named["timestep"].tolist() == [0] and named["encoder_hidden_states"].shape[:2] == (1, 0)
    assert named["prior_token_id"].tolist() == [
        [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 4, 4, 5, 5, 6, 6]
    ]
    assert named["prior_token_drop"] == slice(0, 0)
    assert named["target_size"].tolist() == [[64, 96]] and named["crop_coords"].tolist() == [[0, 0]]
    assert torch.equal(named["hidden_states"], condition.source.latents)


def test_trajectory_slices_and_moves(dit):
    trajectory = run(dit, source=True)
    mask = torch.tensor([False, True, True])
    part = trajectory.select(mask).to("cpu")
    assert torch.equal(part.final, trajectory.final[1:]) and torch.equal(part.log_probs, trajectory.log_probs[1:])
    assert part.condition.batch_size == 2 and part.condition.source.latents.shape[0] == 2
    assert torch.equal(part.at(2), trajectory.at(2)[1:])


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("source", [False, True])
def test_branches_are_rows_that_start_alike(dit, source, micro):
    """6 rows in branches of 2 against the same rows sampled one by one from the same starts."""
    tokens = torch.randint(0, 64, (3, 4), generator=torch.Generator().manual_seed(3))
    sources = {"sources": rand(3, 3, 64, 64).sigmoid(), "source_tokens": tokens} if source else {}
    condition = dit.condition(PROMPTS, tokens, GRID, **sources).repeat_interleave(2)
    starts, drawn = rand(3, 4, 8, 8).repeat_interleave(2, 0), rand(1, 6, 4, 8, 8, seed=1)
    calls = []
    options = {"guidance_scale": 1.5, "kernel": "flow", "sde_indices": (2,), "step_noise": drawn, "store": True}
    branched = dit.sample(
        starts,
        condition,
        dit.schedule(STEPS, 64, 64),
        branches=2,
        micro_batch_size=micro,
        on_step=calls.append,
        **options,
    )
    plain = dit.sample(starts, condition, dit.schedule(STEPS, 64, 64), **options)
    torch.testing.assert_close(branched.final, plain.final, atol=1e-5, rtol=1e-5)
    assert torch.equal(branched.at(2)[0::2], branched.at(2)[1::2])
    assert not torch.equal(branched.final[0::2], branched.final[1::2])
    assert METHOD.deviation(dit, branched, 2).max() <= 1e-5
    batches = 1 if micro is None else 2
    assert calls.count(0) == batches and calls.count(3) == (1 if micro is None else 3)


def test_branches_need_a_step_to_part_at(dit):
    with pytest.raises(ValueError, match="3 branches need SDE steps"):
        run(dit, kernel="ode", indices=(), store=False, branches=3)
