"""A few-step SDXL draws here what its exported pipeline draws in stock diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from glm_training.models.family import FewSteps
from glm_training.models.sdxl.family import SDXL, ModelLoadError
from glm_training.utils.randomness import make_generator, normal

PROMPTS = ["a red circle", "a cat"]
SIDE = 64


def drawn(family: SDXL, steps: int) -> torch.Tensor:
    return family.generate(PROMPTS, height=SIDE, width=SIDE, seed=3, num_inference_steps=steps, guidance_scale=1.0)


@pytest.mark.parametrize(("steps", "timestep"), [(4, None), (2, None), (1, None), (1, 399)])
def test_the_exported_pipeline_samples_the_same_in_stock_diffusers(tmp_path, steps, timestep) -> None:
    family = SDXL.load("tiny-random", seed=1)
    family.unet.sample_in_few_steps(steps, timestep)
    family.save_pretrained(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert isinstance(stock.scheduler, LCMScheduler)
    names = [(p, 0) for p in range(len(PROMPTS))]
    images = stock(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        latents=normal(3, "generate/latents", names, family.unet.latent_shape(SIDE, SIDE)),
        generator=[make_generator(3, "generate/steps", *name) for name in names],
        guidance_scale=1.0,
        output_type="pt",
        **({"num_inference_steps": steps} if timestep is None else {"timesteps": [timestep]}),
    ).images
    torch.testing.assert_close(drawn(family, steps), images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("steps", "timestep"), [(4, None), (1, 399)])
def test_a_saved_one_knows_how_it_is_drawn(tmp_path, steps, timestep) -> None:
    family = SDXL.load("tiny-random", seed=1)
    family.draw_in_few_steps(FewSteps(steps, timestep))
    family.save_pretrained(tmp_path)
    again = SDXL.load(tmp_path)
    assert again.few_steps == FewSteps(steps, timestep)
    torch.testing.assert_close(drawn(again, steps), drawn(family, steps))
    (tmp_path / "few_steps.json").write_text("{")
    with pytest.raises(ModelLoadError, match="few_steps.json does not say how to draw"):
        SDXL.load(tmp_path)


def test_a_step_is_the_denoisers_step() -> None:
    """What a distilled UNet is trained for (`UNetDenoiser.step`) is how it is sampled."""
    family = SDXL.load("tiny-random", seed=1)
    family.unet.sample_in_few_steps(4)
    denoiser, names = family.denoiser(SIDE, SIDE), [(0, 0)]
    levels = denoiser.sampling_levels(4)
    text = family.unet.encode_prompts(PROMPTS[:1])
    ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)
    latents = normal(3, "generate/latents", names, family.unet.latent_shape(SIDE, SIDE))
    generator = make_generator(3, "generate/steps", 0, 0)
    with torch.no_grad():
        for index in range(4):
            here = levels.select(slice(index, index + 1))
            clean = denoiser.clean(family.unet(latents, here.timestep, text, ids), latents, here)
            if index < 3:
                noise = torch.randn(latents.shape, generator=generator)
                latents = denoiser.step(clean, latents, here, levels.select(slice(index + 1, index + 2)), noise)
        expected = family.unet.decode_latents(clean)
    torch.testing.assert_close(drawn(family, 4)[:1], expected, atol=1e-4, rtol=0)
