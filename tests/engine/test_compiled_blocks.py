"""`training.compile`: blocks compiled in place give the numbers and gradients of plain ones.

By the backend `aot_eager`, which traces, splits and differentiates as inductor does and then runs PyTorch's own
kernels: to generate and build code takes minutes.
"""

from __future__ import annotations

import pytest
import torch

from glm_training.engine.errors import SettingsError
from glm_training.engine.families import build_family, compile_blocks
from glm_training.engine.preparation import _check_speed
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.lora import add_lora, trainable_parameters
from glm_training.trainers.run import prepare
from glm_training.utils.distributed import World
from tests.runs import config_of


def family_with(part: str, *, compiled: bool, lora: bool) -> GLMImage:
    torch._dynamo.reset()
    family = GLMImage.load("tiny-random")
    family.set_trainable(**{part: True})
    if lora:
        add_lora(family.module(part), family.component(part).lora_targets, rank=2, alpha=4)
        with torch.no_grad():
            for name, weight in family.module(part).named_parameters():
                if ".lora_B." in name:
                    weight.normal_(generator=torch.Generator().manual_seed(1))
    family.component(part).enable_gradient_checkpointing()
    family.component(part).train()
    if compiled:
        compile_blocks(family.sharding_units(part), backend="aot_eager")
    return family


def numbers(family: GLMImage, part: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(1, 3, 64, 64, generator=generator)
    prompt = family.ar.encode_prompts(["a red circle"], 64, 64, sources)
    tokens = torch.randint(family.ar.num_codes, (2, prompt.T), generator=generator)
    if part == "ar":
        return family.ar(prompt.repeat_interleave(2), tokens)
    condition = family.dit.condition(["a red circle"], tokens, prompt.large_grid)
    latents = torch.randn(2, *family.dit.latent_shape(64, 64), generator=generator)
    return family.dit(latents, torch.tensor([900, 300]), condition)


@pytest.mark.parametrize(("part", "lora"), [("ar", True), ("dit", False)])
def test_compiled_blocks_compute_the_same(part, lora):
    found = []
    for compiled in (False, True):
        family = family_with(part, compiled=compiled, lora=lora)
        given = numbers(family, part)
        (given * torch.linspace(-1, 1, given.numel()).view_as(given)).sum().backward()
        weights = trainable_parameters(family.module(part))
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        found.append((given.detach(), grads, list(family.module(part).state_dict())))
        assert any(count for key, count in torch._dynamo.utils.counters["stats"].items()) == compiled
        torch._dynamo.utils.counters.clear()
    (plain, plain_grads, plain_names), (fast, fast_grads, fast_names) = found
    assert plain_names == fast_names and plain_grads.keys() == fast_grads.keys() and len(plain_grads) > 5
    torch.testing.assert_close(fast, plain, atol=1e-5 * float(plain.abs().max()), rtol=0)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(fast_grads[name], grad, atol=1e-5 * float(grad.abs().max()), rtol=1e-4, msg=name)


def test_the_key_compiles_the_trained_blocks_alone(tmp_path):
    def compiled(*overrides: str) -> dict[str, int]:
        family = build_family(config_of(tmp_path, "model.component=dit", *overrides), World())
        roots = {"ar": family.module("ar"), "dit": family.module("dit")}
        return {
            name: sum(module._compiled_call_impl is not None for module in root.modules())
            for name, root in roots.items()
        }

    assert compiled() == {"ar": 0, "dit": 0}
    assert compiled("training.compile=true") == {"ar": 0, "dit": 2}


def test_that_the_first_steps_compile_is_told_before_them(tmp_path):
    told = [prepare(config_of(tmp_path, f"training.compile={word}"), World()).notes for word in ("true", "false")]
    assert [sum("compile first, for minutes" in note for note in notes) for notes in told] == [1, 0]


def test_what_a_machine_lacks_for_speed_is_told_beforehand(tmp_path, monkeypatch):
    config = config_of(tmp_path, "training.compile=true", "rollout.cuda_graph=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        SettingsError, match=r"cuda_graph true needs a GPU(.|\n)*needs a C\+\+ compiler.*no-such-compiler"
    ):
        _check_speed(config, torch.device("cpu"))
    monkeypatch.delenv("CXX")
    _check_speed(config_of(tmp_path, "rollout.cuda_graph=auto"), torch.device("cpu"))
