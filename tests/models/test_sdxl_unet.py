"""SDXL's component: schedule formulas, conditions, chunking, what is trained, and what its prediction depends on."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn.parallel import DistributedDataParallel

from glm_training.models.library_versions import without_buffers_sent
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.tiny import build_tiny, build_tiny_taesd
from glm_training.models.sdxl.types import SDXLText, UNetCondition, add_time_ids
from glm_training.models.sdxl.unet import UNetComponent

PROMPTS = ["a red circle", "a cat", ""]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet() -> UNetComponent:
    return SDXL.from_pipeline(build_tiny(), build_tiny_taesd()).unet


def inputs(unet: UNetComponent, prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor, SDXLText, torch.Tensor]:
    rows = len(prompts)
    ids = add_time_ids((80, 64), (3, 0), (64, 64), rows=rows)
    return draw(rows, 4, 8, 8), torch.tensor([999, 500, 1])[:rows], unet.encode_prompts(prompts), ids


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_schedule_is_that_of_its_scheduler() -> None:
    pipeline = build_tiny(prediction_type="v_prediction")
    schedule, steps = NoiseSchedule(pipeline.scheduler), torch.tensor([0, 400, 999])
    signal, spread = schedule.coefficients(steps)
    torch.testing.assert_close(signal**2, pipeline.scheduler.alphas_cumprod[steps])
    torch.testing.assert_close(signal**2 + spread**2, torch.ones(3))
    assert schedule.length == 1000 and schedule.prediction == "v_prediction"


def test_schedule_refuses_what_it_cannot_do() -> None:
    schedule = NoiseSchedule(build_tiny().scheduler)
    with pytest.raises(ValueError, match="whole numbers"):
        schedule.coefficients(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        NoiseSchedule(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="'sample'"):
        NoiseSchedule(DDPMScheduler(prediction_type="sample"))


# -- conditions --------------------------------------------------------------------------------------------------------


def test_time_ids() -> None:
    assert add_time_ids((80, 64), (3, 0), (64, 48)).tolist() == [[80, 64, 3, 0, 64, 48]]
    ids = add_time_ids([(80, 64), (100, 90)], torch.tensor([[3, 0], [0, 7]]), (64, 48))
    assert ids.tolist() == [[80, 64, 3, 0, 64, 48], [100, 90, 0, 7, 64, 48]] and ids.dtype == torch.float32
    assert add_time_ids((1, 2), (0, 0), (1, 2), rows=3).shape == (3, 6)
    with pytest.raises(ValueError, match="must agree in B"):
        add_time_ids([(1, 2), (3, 4)], (0, 0), (1, 2), rows=3)
    with pytest.raises(ValueError, match="crop must be one pair"):
        add_time_ids((1, 2), (0, 0, 0), (1, 2))  # type: ignore[arg-type]


def counted_text(*rows: int) -> SDXLText:
    """Row r of r everywhere: two tokens of width 3, pooled of width 2."""
    values = torch.tensor(rows).float()
    return SDXLText(values.view(-1, 1, 1).expand(-1, 2, 3), values.view(-1, 1).expand(-1, 2))


def rows_of(text: SDXLText) -> list[float]:
    """What `counted_text` was given; every number of a row must agree."""
    assert text.prompt_embeds.shape[1:] == (2, 3) and text.pooled.shape[1:] == (2,)
    assert bool((text.prompt_embeds == text.pooled[:, :1, None]).all() and (text.pooled == text.pooled[:, :1]).all())
    return text.pooled[:, 0].tolist()


def test_both_texts_of_a_row_stay_together() -> None:
    text = counted_text(1, 2, 3)
    assert rows_of(text.repeat_interleave(2)) == [1, 1, 2, 2, 3, 3]
    assert rows_of(text.select(torch.tensor([2, 0]))) == [3, 1] and rows_of(text.select(slice(1, 3))) == [2, 3]
    assert rows_of(text.select(torch.tensor([True, False, True]))) == [1, 3]
    assert rows_of(SDXLText.cat([text, counted_text(7)])) == [1, 2, 3, 7] and rows_of(text.zeros()) == [0, 0, 0]
    for wrong in ((torch.ones(2, 3), torch.ones(2, 2)), (torch.ones(2, 2, 3), torch.ones(3, 2))):
        with pytest.raises(ValueError, match="an SDXLText needs"):
            SDXLText(*wrong)


def test_rows_of_a_condition_keep_their_sizes_and_their_negative() -> None:
    condition = UNetCondition(counted_text(1, 2, 3), torch.arange(18.0).view(3, 6), counted_text(4, 5, 6))
    picked = condition.select(torch.tensor([2, 0]))
    assert (len(condition), len(picked), rows_of(picked.text)) == (3, 2, [3, 1])
    assert picked.time_ids[:, 0].tolist() == [12, 0]
    assert picked.negative is not None and rows_of(picked.negative) == [6, 4]
    moved = picked.to("cpu")
    assert moved.negative is not None and rows_of(moved.negative) == [6, 4] and rows_of(moved.text) == [3, 1]
    assert UNetCondition(counted_text(1), torch.zeros(1, 6)).select(slice(1)).negative is None


def test_negative_text(unet) -> None:
    text = unet.encode_prompts(PROMPTS)
    zeros = unet.negative_text(text)
    assert zeros.prompt_embeds.count_nonzero() == zeros.pooled.count_nonzero() == 0 and len(zeros) == 3
    empty = unet.negative_text(text, "")
    torch.testing.assert_close(empty.prompt_embeds, text.prompt_embeds[[2, 2, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(empty.pooled, text.pooled[[2, 2, 2]], atol=1e-5, rtol=0)
    unforced = unet.sharing(unet.unet)
    unforced.force_zeros_for_empty_prompt = False
    assert torch.equal(unforced.negative_text(text).pooled, empty.pooled)


def test_rows_of_text(unet) -> None:
    text = unet.encode_prompts(PROMPTS)
    again = SDXLText.cat([text.select(slice(0, 1)), text.select(torch.tensor([1, 2]))])
    assert torch.equal(again.prompt_embeds, text.prompt_embeds) and torch.equal(again.pooled, text.pooled)
    assert torch.equal(text.repeat_interleave(2).pooled, text.pooled[[0, 0, 1, 1, 2, 2]])
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="non-empty list"):
            unet.encode_prompts(prompts)


# -- prediction --------------------------------------------------------------------------------------------------------


def test_every_input_changes_its_own_row_only(unet) -> None:
    latents, steps, text, ids = inputs(unet)
    with torch.no_grad():
        before = unet(latents, steps, text, ids)
        assert before.shape == latents.shape and before.dtype == torch.float32
        other = unet.encode_prompts(["a red circle", "a photo of the sign", ""])
        sizes = add_time_ids([(80, 64), (300, 64), (80, 64)], (3, 0), (64, 64))
        crops = add_time_ids((80, 64), [(3, 0), (3, 30), (3, 0)], (64, 64))
        changed = [
            unet(latents, steps, other, ids),
            unet(latents, steps, SDXLText(other.prompt_embeds, text.pooled), ids),
            unet(latents, steps, SDXLText(text.prompt_embeds, other.pooled), ids),
            unet(latents, steps, text, sizes),
            unet(latents, steps, text, crops),
            unet(latents, torch.tensor([999, 400, 1]), text, ids),
        ]
    for after in changed:
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-5, rtol=0)
        assert (after[1] - before[1]).abs().max() > 1e-5


def test_guidance_leads_away_from_the_negative(unet) -> None:
    latents, steps, text, ids = inputs(unet)
    negative = unet.encode_prompts(["a blue square"] * 3)
    with torch.no_grad():
        conditional, unconditional = unet(latents, steps, text, ids), unet(latents, steps, negative, ids)
        zeros = unet(latents, steps, text.zeros(), ids)
        guided = unet(latents, steps, text, ids, guidance_scale=7.0, negative=negative)
        default = unet(latents, steps, text, ids, guidance_scale=7.0)
        assert torch.equal(unet(latents, steps, text, ids, guidance_scale=0.0, negative=negative), conditional)
    torch.testing.assert_close(guided, 7 * conditional - 6 * unconditional, atol=1e-4, rtol=0)
    torch.testing.assert_close(default, 7 * conditional - 6 * zeros, atol=1e-4, rtol=0)


def test_wrong_inputs_are_named(unet) -> None:
    latents, steps, text, ids = inputs(unet)
    with pytest.raises(ValueError, match="latents must be"):
        unet(latents[:, :3], steps, text, ids)
    with pytest.raises(ValueError, match="timestep must be"):
        unet(latents, steps.bfloat16(), text, ids)
    with pytest.raises(ValueError, match="timestep must be"):
        unet(latents, steps[:2], text, ids)
    with pytest.raises(ValueError, match="3 rows of latents"):
        unet(latents, steps, text.select(slice(0, 2)), ids)
    with pytest.raises(ValueError, match="time_ids"):
        unet(latents, steps, text, ids[:, :5])
    with pytest.raises(ValueError, match="multiples of 8 px"):
        unet.latent_shape(60, 64)
    assert unet.latent_shape(64, 80) == (4, 8, 10)


def test_what_makes_no_sdxl_is_refused(unet) -> None:
    other = build_tiny().unet
    for change, message in (
        ({"time_cond_proj_dim": 256}, "LCM"),
        ({"in_channels": 9}, "inpainting"),
        ({"addition_embed_type": None}, "addition_embed_type None"),
    ):
        other.register_to_config(**change)
        with pytest.raises(ValueError, match=message):
            unet.sharing(other)


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(unet, monkeypatch) -> list[dict[str, list[float]]]:
    """What the UNet of `unet` is asked, a call each; it predicts nothing but zeros."""
    calls: list[dict[str, list[float]]] = []

    def answer(latents, timestep, *, encoder_hidden_states, added_cond_kwargs, return_dict):
        calls.append(
            {
                "times": timestep.tolist(),
                "sizes": added_cond_kwargs["time_ids"][:, 0].tolist(),
                "pooled": added_cond_kwargs["text_embeds"][:, 0].tolist(),
                "text": encoder_hidden_states[:, 0, 0].tolist(),
                "latents": latents[:, 0, 0, 0].tolist(),
            }
        )
        return (torch.zeros_like(latents),)

    monkeypatch.setattr(unet.unet, "forward", answer)
    return calls


SIZES = add_time_ids([(10, 1), (20, 1), (30, 1)], (0, 0), (64, 64))


def test_every_part_of_a_row_goes_through_the_unet_together(unet, asked) -> None:
    noise = torch.ones(3, 4, 8, 8)
    unet.sample(noise, counted_text(1, 2, 3), SIZES, steps=1, guidance_scale=1.0, micro_batch_size=2)
    assert [call["sizes"] for call in asked] == [[10, 20], [30]]
    assert [call["pooled"] for call in asked] == [call["text"] for call in asked] == [[1, 2], [3]]
    asked.clear()
    options = {"steps": 1, "guidance_scale": 5.0, "negative": counted_text(7, 8, 9), "micro_batch_size": 2}
    unet.sample(noise, counted_text(1, 2, 3), SIZES, **options)
    assert [call["sizes"] for call in asked] == [[10, 20, 10, 20], [30, 30]]
    assert [call["pooled"] for call in asked] == [[7, 8, 1, 2], [9, 3]]
    asked.clear()
    unet.sample(noise, counted_text(1, 2, 3), SIZES, steps=2, guidance_scale=5.0)
    assert [call["pooled"] for call in asked] == [[0, 0, 0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("steps", "told", "expected"),
    [(1, 399, [399]), (1, None, [999]), (2, 399, [999, 499]), (4, 0, [999, 749, 499, 249])],
)
def test_only_a_single_step_is_told_another_timestep(unet, asked, monkeypatch, steps, told, expected) -> None:
    monkeypatch.setattr(unet, "scheduler", unet.scheduler)
    monkeypatch.setattr(unet, "one_step_timestep", None)
    unet.sample_in_few_steps(steps, told)
    seen: list[int] = []
    latents = torch.ones(2, 4, 8, 8)
    options = {"steps": steps, "guidance_scale": 1.0, "on_step": seen.append}
    unet.sample(latents, counted_text(1, 2), SIZES[:2], **options)
    assert [call["times"] for call in asked] == [[time, time] for time in expected] and seen == list(range(steps))


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_the_unet_is_trained_and_checkpointing_keeps_its_gradients() -> None:
    family = SDXL.load("tiny-random", taesd="tiny-random")
    family.set_trainable(unet=True)
    family.train()
    unet = family.unet
    assert unet.unet.training
    assert not any(part.training for part in (unet.vae, unet.taesd, unet.text_encoder, unet.text_encoder_2))
    wrapped = {name for name, param in unet.named_parameters() if param.requires_grad}
    assert wrapped == {f"unet.{name}" for name, _ in unet.unet.named_parameters()}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(*inputs(unet)).square().mean().backward()
        gradients.append({name: param.grad.clone() for name, param in family.trainable("unet").items()})
    assert gradients[0].keys() == gradients[1].keys() == dict(unet.unet.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)
    unet.disable_gradient_checkpointing()
    assert len(family.sharding_units("unet")) > 4
    family.set_trainable(unet=False)
    assert not family.trainable("unet")


def test_ddp_wraps_it(tmp_path) -> None:
    family = SDXL.load("tiny-random")
    family.set_trainable(unet=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(family.unet, **without_buffers_sent())
        wrapped(*inputs(family.unet)).square().mean().backward()
        assert all(param.grad is not None for param in family.trainable("unet").values())
    finally:
        torch.distributed.destroy_process_group()


# -- images ------------------------------------------------------------------------------------------------------------


def test_chunked_encoding_is_full_encoding(unet) -> None:
    images, noise = torch.rand(5, 3, 64, 48, generator=torch.Generator().manual_seed(0)), draw(5, 4, 8, 6)
    for drawn in (None, noise):
        full = unet.encode_images(images, micro_batch_size=5, noise=drawn)
        chunked = unet.encode_images(images, micro_batch_size=2, noise=drawn)
        assert full.shape == (5, 4, 8, 6) and full.dtype == torch.float32
        torch.testing.assert_close(chunked, full, atol=1e-5, rtol=1e-5)
    posterior = unet.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(full, 0.13025 * (posterior.mean + posterior.std * noise), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="values in"):
        unet.encode_images(images * 2)
    with pytest.raises(ValueError, match="micro_batch_size"):
        unet.encode_images(images, micro_batch_size=0)


@pytest.mark.parametrize("taesd", [False, True])
def test_decoding_passes_a_gradient_and_may_be_chunked(unet, taesd: bool) -> None:
    latents = draw(3, 4, 8, 8).requires_grad_()
    images = unet.decode_latents(latents, taesd=taesd)
    assert images.shape == (3, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    chunked = unet.decode_latents(latents.detach(), taesd=taesd, micro_batch_size=2)
    torch.testing.assert_close(chunked, images.detach(), atol=1e-5, rtol=0)
    images.mean().backward()
    assert latents.grad.abs().min(dim=0).values.max() > 0
    assert all(param.grad is None for param in unet.parameters())


def test_decoding_by_hand(unet) -> None:
    latents = draw(1, 4, 8, 8)
    with torch.no_grad():
        slow = unet.vae.decode(latents / 0.13025).sample
        small = unet.taesd.decode(latents).sample
    torch.testing.assert_close(unet.decode_latents(latents), (slow / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(unet.decode_latents(latents, taesd=True), (small / 2 + 0.5).clamp(0, 1))
    bare = SDXL.load("tiny-random").unet
    with pytest.raises(ValueError, match="without a TAESD"):
        bare.decode_latents(latents, taesd=True)
    with pytest.raises(FloatingPointError, match="VAE decodes"):
        bare.decode_latents(latents * torch.nan)


def test_a_vae_that_overflows_in_fp16_is_kept_in_fp32() -> None:
    unet = SDXL.load("tiny-random", dtype=torch.float16).unet
    assert (unet.unet.dtype, unet.vae.dtype) == (torch.float16, torch.float32)
    assert SDXL.load("tiny-random", dtype=torch.bfloat16).unet.vae.dtype == torch.bfloat16
    pipeline = build_tiny().to(dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=False)
    assert SDXL.from_pipeline(pipeline).unet.vae.dtype == torch.float16


def test_sharing_shares_all_but_the_unet(unet) -> None:
    other = unet.sharing(build_tiny(seed=5).unet)
    assert other.vae is unet.vae and other.text_encoder_2 is unet.text_encoder_2 and other.taesd is unet.taesd
    arguments = inputs(unet)
    with torch.no_grad():
        assert not torch.equal(other(*arguments), unet(*arguments))
