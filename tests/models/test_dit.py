"""The DiT component: what its velocity depends on, and what it must not depend on."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_glm_image import GlmImageAttnProcessor
from packaging.version import Version
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.tiny import build_tiny

GRID = (2, 3)
PROMPTS = ["no quotes", 'a sign "OPEN"', 'signs "left lane" and "right"']


def make_dit() -> DiTComponent:
    pipe = build_tiny()
    pipe.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.5, 2.0, 1.5, 0.7])
    return DiTComponent(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


@pytest.fixture(scope="module")
def dit() -> DiTComponent:
    return make_dit()


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, grid: tuple[int, int] = GRID, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, grid[0] * grid[1]), generator=torch.Generator().manual_seed(seed))


def images(rows: int, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    shape = (rows, 3, grid[0] * 32, grid[1] * 32)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_condition(dit: DiTComponent, prompts=PROMPTS, plans: int = 1, source: bool = False):
    rows = len(prompts) * plans
    if not source:
        return dit.condition(prompts, tokens(rows), GRID)
    given = images(len(prompts), (2, 2))
    return dit.condition(prompts, tokens(rows), GRID, given, tokens(len(prompts), (2, 2), seed=7))


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(rows, 4, GRID[0] * 4, GRID[1] * 4), torch.tensor([900.0, 500.0, 20.0, 300.0, 7.0, 0.0])[:rows]


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_schedule_conditions_on_unshifted_and_steps_on_shifted(dit):
    schedule = dit.schedule(4, 64, 96)
    assert schedule.timesteps.tolist() == [999, 749, 499, 249]  # trunc of 1000, 750.25, 500.5, 250.75, minus 1
    mu = 0.75 * (4 * 6 / 256) ** 0.5 + 0.25
    expected = [mu / (mu + 1 / (t / 1000) - 1) for t in (1000, 750, 500, 250)]
    torch.testing.assert_close(schedule.sigmas, torch.tensor([*expected, 0.0]))
    assert schedule.sigma_max == pytest.approx(expected[1])
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == torch.float32
    dit.schedule(1, 64, 64)
    assert len(dit.scheduler.timesteps) == 1000  # the component's own scheduler is left alone


def test_training_sigmas(dit):
    u = torch.tensor([0.0, 0.0005, 0.0015, 0.5004, 0.9985, 0.9995, 1.0])
    timestep, sigma = dit.training_sigmas(u, 64, 64)
    assert timestep.tolist() == [0, 0, 1, 500, 998, 999, 999]
    mu = 0.75 * (16 / 256) ** 0.5 + 0.25
    levels = torch.tensor([0.001, 0.001, 0.002, 0.501, 0.999, 1.0, 1.0])
    torch.testing.assert_close(sigma, mu * levels / (1 + (mu - 1) * levels))
    assert sigma[-1] == 1, "pure noise, exactly"
    with pytest.raises(ValueError, match="u must lie in"):
        dit.training_sigmas(torch.tensor([1.2]), 64, 64)


def test_training_meets_every_level_that_a_sampler_asks_for_equally_often(dit):
    """Draws (i + 1/2) / 3000 fall three to a level; the sampler of 1000 steps has t = 999 .. 0 and their sigmas."""
    timestep, sigma = dit.training_sigmas((torch.arange(3000) + 0.5) / 3000, 64, 64)
    assert timestep.long().bincount().tolist() == [3] * 1000
    asked = dit.schedule(1000, 64, 64)
    assert asked.timesteps.tolist() == list(range(999, -1, -1))
    torch.testing.assert_close(sigma[::3].flip(0), asked.sigmas[:-1])
    on_grid, _ = dit.training_sigmas(torch.arange(1, 1001) / 1000, 64, 64)
    assert on_grid.tolist() == list(range(1000)), "k / 1000 is level k, however fp32 rounds it"
    four = dit.schedule(4, 64, 64)
    again = dit.training_sigmas((four.timesteps + 1) / 1000, 64, 64)
    assert torch.equal(again[0], four.timesteps)
    torch.testing.assert_close(again[1], four.sigmas[:-1])


def test_unsupported_schedules_are_refused(dit):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        dit.schedule(0, 64, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        dit.schedule(4, 64, 80)
    pipe = build_tiny()
    karras = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        DiTComponent(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, karras)


# -- velocity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_batch_equals_single(dit, source, guidance_scale):
    """Prompts of different glyph length: padding is neither attended to nor felt."""
    condition = make_condition(dit, source=source)
    assert condition.glyph_mask.sum(1).unique().numel() == 3
    latents, timestep = inputs(3)
    together = dit(latents, timestep, condition, guidance_scale=guidance_scale)
    assert together.dtype == torch.float32
    bound = 2e-6 * (2 * guidance_scale - 1)  # guidance adds up g and g - 1 times the rounding of its two passes
    for row in range(3):
        one = torch.tensor([row])
        single = dit(latents[one], timestep[one], condition.select(one), guidance_scale=guidance_scale)
        torch.testing.assert_close(together[one], single, atol=bound, rtol=0)
    garbage = condition.glyph.masked_fill(~condition.glyph_mask[..., None], 50.0)
    condition.glyph.copy_(garbage)
    again = dit(latents, timestep, condition, guidance_scale=guidance_scale)
    assert torch.equal(together, again)


def test_unpadded_batch_uses_stock_attention_bit_for_bit(dit):
    condition = make_condition(dit, ['a "word"', 'b "term"'])
    stock = copy.deepcopy(dit)
    for module in stock.transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(GlmImageAttnProcessor())
    latents, timestep = inputs(2)
    upsampled = torch.nn.functional.interpolate(condition.prior_tokens.view(2, 1, *GRID).float(), scale_factor=2)
    upsampled = upsampled.long().flatten(1)
    expected = stock.transformer(
        latents,
        condition.glyph,
        upsampled,
        torch.zeros_like(upsampled, dtype=torch.bool),
        timestep,
        torch.tensor([[64.0, 96.0]] * 2),
        torch.zeros(2, 2),
    ).sample
    assert torch.equal(dit(latents, timestep, condition), expected)


def test_guidance_contrasts_with_no_condition_at_all(dit):
    condition = make_condition(dit, source=True)
    latents, timestep = inputs(3)
    bare = dit.condition([""], condition.prior_tokens, GRID)
    unconditional = dit(latents, timestep, bare, prior_drop=torch.ones(3, dtype=torch.bool))
    conditional = dit(latents, timestep, condition)
    guided = dit(latents, timestep, condition, guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-5, rtol=0)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_prior_drop_is_per_row(dit):
    condition = make_condition(dit)
    other = dit.condition(PROMPTS, tokens(3, seed=5), GRID)
    latents, timestep = inputs(3)
    drop = torch.tensor([True, False, False])
    mixed = dit(latents, timestep, condition, prior_drop=drop)
    torch.testing.assert_close(mixed[1:], dit(latents, timestep, condition)[1:], atol=1e-5, rtol=0)
    changed = dit(latents, timestep, other, prior_drop=drop)
    torch.testing.assert_close(changed[0], mixed[0], atol=1e-5, rtol=0)  # a dropped row does not see its tokens
    assert (changed[1] - mixed[1]).abs().max() > 1e-3


@pytest.mark.parametrize("source", [False, True])
def test_dropped_rows_are_the_unconditional_branch(dit, source):
    condition = make_condition(dit, source=source)
    latents, timestep = inputs(3)
    bare = dit.condition([""], condition.prior_tokens, GRID)
    nothing = dit(latents, timestep, bare, prior_drop=torch.ones(3, dtype=torch.bool))
    dropped = dit.drop_condition(condition, torch.tensor([True, False, True]))
    mixed = dit(latents, timestep, dropped)
    kept = dit(latents, timestep, condition)
    torch.testing.assert_close(mixed[[0, 2]], nothing[[0, 2]], atol=2e-6, rtol=0)
    torch.testing.assert_close(mixed[1], kept[1], atol=2e-6, rtol=0)
    all_dropped = dit.drop_condition(condition, torch.ones(3, dtype=torch.bool))
    assert all_dropped.glyph.shape[1] == 1
    torch.testing.assert_close(dit(latents, timestep, all_dropped), nothing, atol=2e-6, rtol=0)


def test_timestep_stays_exact_in_bf16():
    dit = make_dit()
    dit.to(torch.bfloat16)
    seen = []
    dit.transformer.time_condition_embed.time_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    condition = make_condition(dit)
    latents = inputs(3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = dit(latents, torch.full((3,), 999.0), condition)
    assert velocity.dtype == torch.float32
    assert seen[0].tolist() == [999, 999, 999]
    with pytest.raises(ValueError, match="cast_forward_inputs"):
        dit(latents, torch.full((3,), 999.0, dtype=torch.bfloat16), condition)
    with pytest.raises(ValueError, match="whole numbers"):
        dit(latents, torch.full((3,), 99.5), condition)


def test_wrong_inputs_are_named(dit):
    condition = make_condition(dit)
    latents, timestep = inputs(3)
    with pytest.raises(ValueError, match=r"latents must be \[3, 4, 8, 12\]"):
        dit(latents[:, :, :4], timestep, condition)
    with pytest.raises(ValueError, match=r"image codes in \[0, 64\)"):
        dit.condition(PROMPTS, tokens(3) + 10, GRID)
    with pytest.raises(ValueError, match="same number of rows"):
        dit.condition(PROMPTS, tokens(4), GRID)
    with pytest.raises(ValueError, match="needs sources and source_tokens"):
        dit.condition(PROMPTS, tokens(3), GRID, images(3, (2, 2)))
    with pytest.raises(ValueError, match="do not match source_grid"):
        dit.condition(PROMPTS, tokens(3), GRID, images(3, (2, 2)), tokens(3, (2, 3)), (2, 3))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_rows_of_one_source_share_one_reference_pass(dit):
    condition = make_condition(dit, plans=2, source=True).repeat_interleave(2)
    assert condition.batch_size == 12 and condition.source.latents.shape[0] == 3
    picked = condition.select(torch.tensor([11, 4, 5]))
    assert picked.source.latents.shape[0] == 2 and picked.source.rows.tolist() == [1, 0, 0]
    latents, timestep = inputs(3)
    velocity = dit(latents, timestep, picked)
    for row, source in ((0, 2), (1, 1), (2, 1)):
        one = torch.tensor([row])
        alone = dit.condition(
            [PROMPTS[source]],
            picked.prior_tokens[one],
            GRID,
            images(3, (2, 2))[[source]],
            tokens(3, (2, 2), seed=7)[[source]],
        )
        torch.testing.assert_close(velocity[one], dit(latents[one], timestep[one], alone), atol=2e-6, rtol=0)


@pytest.mark.parametrize("guidance_scale, calls", [(1.0, 4), (1.5, 7)])
def test_source_keys_are_made_once_per_trajectory(dit, guidance_scale, calls):
    count = []
    handle = dit.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    condition = make_condition(dit, source=True)
    dit.sample(inputs(3)[0], condition, dit.schedule(3, 64, 96), guidance_scale=guidance_scale)
    handle.remove()
    assert len(count) == calls  # one for the sources, then one or two per step


def gradients(dit: DiTComponent, condition, guidance_scale: float) -> dict[str, torch.Tensor]:
    latents, timestep = inputs(condition.batch_size)
    dit.zero_grad()
    dit(latents, timestep, condition, guidance_scale=guidance_scale).square().mean().backward()
    return {name: p.grad.clone() for name, p in dit.transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("source", [False, True])
def test_checkpointing_changes_no_gradient(source, guidance_scale):
    dit = make_dit()
    dit.train()
    condition = make_condition(dit, source=source)
    plain = gradients(dit, condition, guidance_scale)
    dit.enable_gradient_checkpointing()
    recomputed = []
    dit.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    checkpointed = gradients(dit, condition, guidance_scale)
    passes = 1 + source + (guidance_scale != 1)
    assert len(recomputed) == 2 * passes  # it really ran again in backward
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_source_path_carries_gradient():
    dit = make_dit()
    condition = make_condition(dit, source=True)
    latents, timestep = inputs(3)
    whole = gradients(dit, condition, 1.0)
    with torch.no_grad():
        reference = dit.reference_keys(condition.source)
    dit.zero_grad()
    dit(latents, timestep, condition, reference=reference).square().mean().backward()
    weight = dit.transformer.transformer_blocks[0].attn1.to_k.weight
    assert (weight.grad - whole["transformer_blocks.0.attn1.to_k.weight"]).abs().max() > 1e-5


# -- images ------------------------------------------------------------------------------------------------------------


def test_latents_use_mean_and_std(dit):
    pictures = images(3, (2, 2))
    latents = dit.encode_images(pictures, micro_batch_size=2)
    mode = dit.vae.encode(pictures * 2 - 1).latent_dist.mode()
    mean, std = (torch.tensor(dit.vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (mode - mean) / std, atol=1e-5, rtol=0)
    decoded = dit.decode_latents(latents, micro_batch_size=2)
    expected = (dit.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)
    assert decoded.is_contiguous(), "however the decoder laid it out"
    extreme = dit.decode_latents(rand(1, 4, 8, 8) * 1e4)
    assert extreme.min() == 0 and extreme.max() == 1
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        dit.encode_images(pictures * 2 - 1)


def test_decode_is_differentiable_and_encode_is_not(dit):
    latents = rand(1, 4, 8, 8).requires_grad_()
    dit.decode_latents(latents).mean().backward()
    assert latents.grad.abs().sum() > 0
    assert not dit.encode_images(images(1, (2, 2)).requires_grad_()).requires_grad


def test_frozen_parts_stay_in_eval_mode(dit):
    dit.train()
    assert dit.transformer.training and not dit.vae.training and not dit.text_encoder.training
    dit.eval()
    assert not any(p.requires_grad for part in (dit.vae, dit.text_encoder) for p in part.parameters())


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


OLD_FSDP = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="before torch 2.11 FSDP does not gather a block that is computed anew in the backward pass",
)


@pytest.mark.parametrize("source", [False, pytest.param(True, marks=OLD_FSDP)])
def test_sharding_changes_no_gradient(mesh, source):
    """FSDP frees weights early; the source keys' gradient must still find them, and nothing may be cast on the way."""
    plain, sharded = make_dit(), make_dit()
    expected = gradients(plain, make_condition(plain, source=source), 1.5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for dit, options in ((sharded, {}), (make_dit(), {"mp_policy": policy})):
        for block in dit.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(dit.transformer, mesh=mesh, **options)
        seen = []
        for module in (
            dit.transformer.time_condition_embed.time_proj,
            dit.transformer.time_condition_embed.condition_proj,
        ):
            module.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0]))
        found = gradients(dit, make_condition(dit, source=source), 1.5)
        assert found.keys() == expected.keys() and not dit.transformer.is_gradient_checkpointing
        assert not any(value.is_floating_point() for value in seen)  # a float would have been rounded to bf16
        if not options:
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name].full_tensor(), gradient, atol=1e-5, rtol=1e-4)
