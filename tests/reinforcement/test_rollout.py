"""Which random numbers a rollout draws with, and what the two halves are told, with a family that only notes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm_training.data import Batch
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.reinforcement.rollout import draw_rollout, rollout_settings
from tests.methods.toys import SCHEDULE, condition_of, prompt_of, trajectory_of
from tests.runs import config_of


class Noting:
    """Stands for the family: plan rows are told by their first token, renders by their condition's tokens."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        cpu = torch.device("cpu")
        self.ar = SimpleNamespace(device=cpu, encode_prompts=self.encode, rollout=self.write)
        self.dit = SimpleNamespace(
            device=cpu,
            condition=self.condition,
            latent_shape=lambda height, width: (1, height // 32, width // 32),
            schedule=lambda steps, height, width: (steps, height, width),
            sample=self.sample,
            decode_latents=self.decode,
        )

    def encode(self, prompts, height, width, sources):
        self.given["prompts"] = (prompts, height, width, sources)
        prompt = prompt_of(len(prompts))
        if sources is not None:
            prompt.source_tokens, prompt.source_grid = 10 * torch.arange(len(prompts))[:, None].repeat(1, 4), (2, 2)
        return prompt

    def write(self, prompt, plans, uniforms, **options):
        self.given["tokens"] = options | {"plans": plans, "uniforms": uniforms, "gradient": torch.is_grad_enabled()}
        rows = prompt.repeat_interleave(plans)
        tokens = torch.arange(len(rows))[:, None].repeat(1, 6)
        return ARRollout(rows, tokens, torch.zeros(len(rows), 6), None, options["temperature"])

    def condition(self, prompts, tokens, grid, sources, source_tokens, source_grid):
        self.given["condition"] = {"tokens": tokens, "sources": sources, "source_tokens": source_tokens, "grid": grid}
        found = condition_of(len(tokens))
        found.prior_tokens.copy_(tokens[:, :1])
        return found

    def sample(self, noise, condition, schedule, **options):
        self.given["sample"] = options | {"noise": noise, "condition": condition, "schedule": schedule}
        return trajectory_of(noise)

    def decode(self, latents, *, micro_batch_size):
        self.given["decoded"] = micro_batch_size
        return latents.repeat(1, 3, 1, 1).double()


def drawn(tmp_path, *overrides: str, positions=(5, 9), sde=(0, 2), seed=3, sources=None) -> dict[str, Any]:
    """What the halves are told for two prompts of 2 plans x 2 renders each."""
    family = Noting()
    settings = rollout_settings(config_of(tmp_path, *overrides))
    batch = Batch(list(positions), ["a", "b"][: len(positions)], None, sources)
    found = draw_rollout(family, batch, list(positions), settings, seed=seed, sde_indices=sde)  # type: ignore[arg-type]
    assert found.positions == list(positions) and found.images.dtype == torch.float32
    return family.given


def test_every_sample_has_noise_of_its_own_at_every_step(tmp_path):
    given = drawn(tmp_path)["sample"]
    assert given["noise"].shape == (8, 1, 2, 2) and given["step_noise"].shape == (2, 8, 1, 2, 2)
    numbers = torch.cat([given["noise"].flatten(), given["step_noise"].flatten()])
    assert len(numbers.unique()) == 3 * 8 * 4
    uniforms = drawn(tmp_path)["tokens"]["uniforms"]
    assert uniforms.shape == (4, 6) and len(uniforms.unique()) == 24


def test_draws_belong_to_position_plan_and_render_alone(tmp_path):
    both, alone, other = drawn(tmp_path), drawn(tmp_path, positions=(9,)), drawn(tmp_path, seed=4)
    assert torch.equal(both["sample"]["noise"][4:], alone["sample"]["noise"])
    assert torch.equal(both["sample"]["step_noise"][:, 4:], alone["sample"]["step_noise"])
    assert torch.equal(both["tokens"]["uniforms"][2:], alone["tokens"]["uniforms"])
    for half, name in (("sample", "noise"), ("sample", "step_noise"), ("tokens", "uniforms")):
        assert not (both[half][name] == other[half][name]).any(), name


def test_plans_share_their_noise_where_the_ar_half_alone_learns(tmp_path):
    keys = ["model.component=ar", "rollout.plans_per_prompt=2", "rollout.renders_per_plan=2"]
    given = drawn(tmp_path, *keys, sde=())["sample"]
    noise = given["noise"].view(2, 2, 2, 4)
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert len(noise[:, 0].unique()) == 16, "but neither prompts nor renders do"
    assert (given["kernel"], given["step_noise"], given["store"]) == ("ode", None, False)


def test_branches_of_a_plan_start_alike_and_part_at_the_noisy_step(tmp_path):
    given = drawn(tmp_path, "rollout.branch=true", "rollout.sde_window_size=1")["sample"]
    noise = given["noise"].view(2, 2, 2, 4)
    assert torch.equal(noise[:, :, 0], noise[:, :, 1]) and len(noise.unique()) == 16
    assert len(given["step_noise"].unique()) == 64 and given["branches"] == 2
    assert drawn(tmp_path)["sample"]["branches"] == 1


def test_renders_are_drawn_under_their_own_plans_large_tokens(tmp_path):
    given = drawn(tmp_path)
    assert given["condition"]["tokens"].shape == (4, 4) and given["condition"]["grid"] == (2, 2)
    assert given["sample"]["condition"].prior_tokens.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sources_go_to_both_halves_once_per_prompt(tmp_path):
    sources = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given = drawn(tmp_path, sources=sources)
    assert given["prompts"][3] is sources and given["condition"]["sources"] is sources
    assert given["condition"]["source_tokens"][:, 0].tolist() == [0, 10]


def test_the_halves_draw_as_the_configuration_says(tmp_path):
    keys = {
        "rollout.temperature": 0.6,
        "rollout.top_p": 0.4,
        "rollout.guidance_scale": 2.5,
        "rollout.num_inference_steps": 3,
        "rollout.eta": 0.35,
        "rollout.sde_kernel": "dance",
        "rollout.micro_batch_size": 5,
        "rollout.vae_batch_size": 7,
        "reward.grpo.num_samples": 6,
        "rollout.plans_per_prompt": 3,
        "data.image_size": "{height: 64, width: 96}",
    }
    given = drawn(tmp_path, *(f"{key}={value}" for key, value in keys.items()))
    tokens, sample = given["tokens"], given["sample"]
    assert (tokens["temperature"], tokens["top_p"], tokens["plans"], tokens["do_sample"]) == (0.6, 0.4, 3, True)
    assert (sample["guidance_scale"], sample["eta"], sample["kernel"]) == (2.5, 0.35, "dance")
    assert sample["schedule"] == (3, 64, 96) and given["prompts"][1:3] == (64, 96)
    assert sample["micro_batch_size"] == tokens["micro_batch_size"] == 5 and given["decoded"] == 7
    assert sample["sde_indices"] == (0, 2) and sample["store"] and sample["noise"].shape == (12, 1, 2, 3)
    assert not tokens["gradient"], "nothing is learned from drawing"


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ([], False),
        (["reward.grpo.dit.ratio=guard"], True),
        (["reward.grpo.dit.divergence_threshold=0.1"], True),
    ],
)
def test_means_are_kept_for_the_methods_that_compare_with_them(tmp_path, keys, kept):
    assert drawn(tmp_path, *keys)["sample"]["keep_means"] is kept


def test_all_images_are_decoded_at_once_unless_told(tmp_path):
    assert drawn(tmp_path)["decoded"] == 8
    assert SCHEDULE.steps == 3
