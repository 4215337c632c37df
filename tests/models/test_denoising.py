"""The noise levels of both families: closed forms, and the diffusers schedulers that they must agree with."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler

from glm_training.models.denoising import Denoiser, Levels
from glm_training.models.glm_image.family import DiTDenoiser, GLMImage
from glm_training.models.sdxl.denoiser import UNetDenoiser
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.schedule import NoiseSchedule
from glm_training.models.sdxl.tiny import build_tiny
from glm_training.models.sdxl.types import UNetCondition, add_time_ids

SIZE = (64, 96)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_denoiser(prediction: str = "epsilon", one_step_timestep: int | None = None) -> UNetDenoiser:
    return UNetDenoiser(NoiseSchedule(build_tiny(prediction_type=prediction).scheduler), one_step_timestep)


@pytest.fixture(scope="module")
def glm() -> GLMImage:
    return GLMImage.load("tiny-random")


@pytest.fixture(params=["epsilon", "v_prediction", "velocity"])
def denoiser(request, glm) -> Denoiser:
    return DiTDenoiser(glm.dit, *SIZE) if request.param == "velocity" else unet_denoiser(request.param)


# -- both families -----------------------------------------------------------------------------------------------------


def test_a_perfect_prediction_gives_the_clean_image_back(denoiser) -> None:
    levels = denoiser.levels(torch.tensor([0.01, 0.3, 0.7, 0.95]))
    clean, noise = draw(4, 4, 8, 8), draw(4, 4, 8, 8, seed=1)
    noisy, target = denoiser.noised(clean, noise, levels), denoiser.target(clean, noise, levels)
    torch.testing.assert_close(denoiser.clean(target, noisy, levels), clean, atol=1e-4, rtol=1e-4)
    expected = {"epsilon": noise, "velocity": noise - clean}.get(denoiser.prediction)
    if expected is not None:
        torch.testing.assert_close(target, expected)


def test_a_wrong_prediction_is_wrong_by_the_noise_over_the_signal(denoiser) -> None:
    """d clean / d prediction: -b / a of the noise, -b of v and of the velocity."""
    levels = denoiser.levels(torch.tensor([0.2, 0.9]))
    clean, noise, error = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1), draw(2, 4, 8, 8, seed=2)
    noisy, target = denoiser.noised(clean, noise, levels), denoiser.target(clean, noise, levels)
    scale = levels.spread / levels.signal if denoiser.prediction == "epsilon" else levels.spread
    off = denoiser.clean(target + error, noisy, levels)
    torch.testing.assert_close(off, clean - scale.view(-1, 1, 1, 1) * error, atol=1e-4, rtol=1e-4)


def test_a_step_with_the_true_image_stays_on_its_line(denoiser) -> None:
    clean, noise, fresh = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1), draw(3, 4, 8, 8, seed=2)
    levels, after = denoiser.levels(torch.full((3,), 0.8)), denoiser.levels(torch.full((3,), 0.3))
    moved = denoiser.step(clean, denoiser.noised(clean, noise, levels), levels, after, fresh)
    expected = denoiser.noised(clean, fresh if denoiser.renoises else noise, after)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_levels_are_rows(denoiser) -> None:
    levels = denoiser.levels(torch.tensor([0.1, 0.5, 0.9]))
    assert len(levels) == 3 and len(levels.select(slice(1))) == 1
    twice = levels.select(torch.tensor([2, 2, 0]))
    assert twice.timestep.tolist() == [levels.timestep[i] for i in (2, 2, 0)]
    torch.testing.assert_close(levels.snr(), (levels.signal / levels.spread) ** 2)
    assert bool((levels.snr()[:-1] > levels.snr()[1:]).all()), "more noise, less signal"
    with pytest.raises(ValueError, match="3 noise levels for 2 rows"):
        denoiser.noised(draw(2, 4, 8, 8), draw(2, 4, 8, 8), levels)


# -- SDXL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unet_levels_are_ddpms(prediction) -> None:
    denoiser = unet_denoiser(prediction)
    ddpm = DDPMScheduler.from_config(build_tiny(prediction_type=prediction).scheduler.config)
    steps = torch.tensor([0, 400, 999])
    levels = denoiser.at(steps)
    clean, noise = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(denoiser.noised(clean, noise, levels), ddpm.add_noise(clean, noise, steps))
    expected = noise if prediction == "epsilon" else ddpm.get_velocity(clean, noise, steps)
    torch.testing.assert_close(denoiser.target(clean, noise, levels), expected)
    alphas = ddpm.alphas_cumprod[steps]
    torch.testing.assert_close(levels.snr(), alphas / (1 - alphas), rtol=1e-4, atol=0)
    assert torch.equal(levels.timestep, steps)


def test_unet_levels_cover_every_timestep() -> None:
    timesteps = unet_denoiser().levels(torch.arange(1000) / 1000 + 0.0005).timestep
    assert timesteps.tolist() == list(range(1000))
    assert unet_denoiser().levels(torch.tensor([1.0])).timestep.tolist() == [999]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_few_unet_steps_are_those_of_lcm(steps, prediction) -> None:
    """But for LCM's boundary terms: at t = 124, the least of these, they weigh the input by 1.6e-7."""
    denoiser = unet_denoiser(prediction)
    lcm = LCMScheduler.from_config(build_tiny(prediction_type=prediction).scheduler.config)
    lcm.set_timesteps(steps, original_inference_steps=steps)
    levels = denoiser.sampling_levels(steps)
    assert levels.timestep.tolist() == lcm.timesteps.tolist()
    noisy = draw(1, 4, 8, 8)
    for index in range(steps):
        here, predicted = levels.select(slice(index, index + 1)), draw(1, 4, 8, 8, seed=10 + index)
        clean = denoiser.clean(predicted, noisy, here)
        generator = torch.Generator().manual_seed(index)
        expected = lcm.step(predicted, lcm.timesteps[index], noisy, generator=generator)
        torch.testing.assert_close(clean, expected.denoised, atol=2e-3, rtol=1e-4)
        if index + 1 < steps:
            fresh = draw(1, 4, 8, 8, seed=index)
            noisy = denoiser.step(clean, noisy, here, levels.select(slice(index + 1, index + 2)), fresh)
            torch.testing.assert_close(noisy, expected.prev_sample, atol=2e-3, rtol=1e-4)


def test_one_step_may_be_told_another_timestep() -> None:
    assert unet_denoiser().sampling_levels(1).timestep.tolist() == [999]
    told = unet_denoiser(one_step_timestep=399)
    assert told.sampling_levels(1).timestep.tolist() == [399]
    assert told.sampling_levels(2).timestep.tolist() == [999, 499]
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match="one_step_timestep"):
            unet_denoiser(one_step_timestep=wrong)
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="steps must lie in"):
            unet_denoiser().sampling_levels(wrong)


def test_the_network_is_asked_once_under_its_condition() -> None:
    unet = SDXL.from_pipeline(build_tiny()).unet
    denoiser = UNetDenoiser(unet.schedule)
    text, ids = unet.encode_prompts(["a cat", "a sign"]), add_time_ids((64, 64), (0, 0), (64, 64), rows=2)
    levels, noisy = denoiser.levels(torch.tensor([0.2, 0.7])), draw(2, 4, 8, 8)
    with torch.no_grad():
        found = denoiser.predict(unet, noisy, levels, UNetCondition(text, ids), guidance_scale=3.0)
        assert torch.equal(found, unet(noisy, levels.timestep, text, ids, guidance_scale=3.0))


def test_the_network_is_told_all_of_a_condition() -> None:
    """A network that notes what it is given, and gives its noisy input back."""
    told = []

    def network(*arguments, **named):
        told.append((arguments, named))
        return arguments[0]

    text, negative, ids = object(), object(), object()
    denoiser, noisy = unet_denoiser(), draw(2, 4, 8, 8)
    levels = denoiser.at(torch.tensor([100, 900]))
    condition = UNetCondition(text, ids, negative)  # type: ignore[arg-type]
    assert denoiser.predict(network, noisy, levels, condition, guidance_scale=3.0) is noisy
    denoiser.predict(network, noisy, levels, condition)
    for (given, named), scale in zip(told, (3.0, 1.0), strict=True):
        assert given[0] is noisy and given[1].tolist() == [100, 900] and given[2] is text and given[3] is ids
        assert named == {"guidance_scale": scale, "negative": negative}


# -- GLM-Image ---------------------------------------------------------------------------------------------------------


def test_dit_levels_are_the_shifted_ones(glm) -> None:
    denoiser, u = DiTDenoiser(glm.dit, *SIZE), torch.tensor([0.1, 0.5, 1.0])
    timestep, sigma = glm.dit.training_sigmas(u, *SIZE)
    levels = denoiser.levels(u)
    assert torch.equal(levels.timestep, timestep) and torch.equal(levels.spread, sigma)
    torch.testing.assert_close(levels.signal, 1 - sigma)


def test_dit_steps_are_the_stock_eulers(glm) -> None:
    steps, denoiser = 4, DiTDenoiser(glm.dit, *SIZE)
    levels, schedule = denoiser.sampling_levels(steps), glm.dit.schedule(steps, *SIZE)
    euler = type(glm.dit.scheduler).from_config(glm.dit.scheduler.config)
    patches = (SIZE[0] // 16) * (SIZE[1] // 16)
    asked = (schedule.timesteps + 1).numpy()
    mu = (patches / euler.config.base_image_seq_len) ** 0.5 * euler.config.max_shift + euler.config.base_shift
    euler.set_timesteps(steps, sigmas=asked / 1000, timesteps=asked, mu=mu)
    assert torch.equal(levels.timestep, euler.timesteps - 1)
    noisy = draw(1, 4, 8, 12)
    for index in range(steps):
        here, velocity = levels.select(slice(index, index + 1)), draw(1, 4, 8, 12, seed=index + 5)
        if index + 1 < steps:
            after = levels.select(slice(index + 1, index + 2))
        else:
            after = Levels(torch.zeros(1), torch.ones(1), torch.zeros(1))
        clean = denoiser.clean(velocity, noisy, here)
        moved = denoiser.step(clean, noisy, here, after, draw(1, 4, 8, 12, seed=99))
        (expected,) = euler.step(velocity, euler.timesteps[index], noisy, return_dict=False)
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
        noisy = moved


def test_the_dit_is_told_the_unshifted_time_its_condition_and_the_guidance(glm) -> None:
    told = []
    denoiser, noisy, condition = DiTDenoiser(glm.dit, *SIZE), draw(2, 4, 8, 12), object()
    levels = denoiser.levels(torch.tensor([0.25, 1.0]))
    for options in ({"guidance_scale": 2.0}, {}):
        denoiser.predict(lambda *given, **named: told.append((given, named)), noisy, levels, condition, **options)
    for (given, named), scale in zip(told, (2.0, 1.0), strict=True):
        assert given[0] is noisy and given[1].tolist() == [249, 999] and given[2] is condition
        assert named == {"guidance_scale": scale}
