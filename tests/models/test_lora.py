"""LoRA on both halves: starts as the base, is drawn from its seed, and goes out as PEFT folders or merged weights."""

import copy

import pytest
import torch
from diffusers import GlmImagePipeline
from peft import PeftModel

from glm_training.models import lora
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.snapshot import ParameterSnapshot

GRID = (2, 2)


@pytest.fixture
def family() -> GLMImage:
    return GLMImage.load("tiny-random")


def adapt(family: GLMImage, component: str, seed: int = 0, perturb: bool = True) -> torch.nn.Module:
    module = family.module(component)
    lora.add_lora(module, family.lora_targets(component), rank=2, alpha=4, seed=seed)
    if perturb:  # as if trained
        generator = torch.Generator().manual_seed(1)
        for name, param in lora.adapter_parameters(module).items():
            if "lora_B" in name:
                param.data.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return module


def velocity(family: GLMImage) -> torch.Tensor:
    tokens = torch.arange(4)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return family.dit(noise, torch.tensor([500.0]), family.dit.condition(['"a"'], tokens, GRID), guidance_scale=1.5)


def log_probs(family: GLMImage) -> torch.Tensor:
    prompt = family.ar.encode_prompts(["a sign"], 64, 64)
    with torch.no_grad():
        return family.ar(prompt, torch.arange(prompt.T)[None] % 64)


OUTPUT = {"ar": log_probs, "dit": velocity}
both = pytest.mark.parametrize("component", ["ar", "dit"])


@both
def test_fresh_adapter_is_the_base_bit_for_bit(family, component):
    before = OUTPUT[component](family)
    adapt(family, component, perturb=False)
    assert torch.equal(OUTPUT[component](family), before)


@both
def test_disabled_adapter_is_the_base_bit_for_bit(family, component):
    before = OUTPUT[component](family)
    module = adapt(family, component)
    family.set_trainable(ar=component == "ar", dit=component == "dit")
    trained = set(lora.trainable_parameters(module))
    assert not torch.equal(OUTPUT[component](family), before)
    with lora.adapters_disabled(module):
        assert torch.equal(OUTPUT[component](family), before)
        with pytest.raises(RuntimeError, match="already"), lora.adapters_disabled(module):
            pass
    assert not torch.equal(OUTPUT[component](family), before)
    assert trained and set(lora.trainable_parameters(module)) == trained
    family.set_trainable(ar=False, dit=False)
    with lora.adapters_disabled(module):
        pass
    assert not lora.trainable_parameters(module)


def test_targets_miss_the_vision_tower_and_everything_else(family):
    names = lora.add_lora(family.ar.model, family.ar.lora_targets, rank=2, alpha=4)
    assert len(names) == 2 * 6 and all("language_model.layers" in name for name in names)
    names = lora.add_lora(family.dit.transformer, family.dit.lora_targets, rank=2, alpha=4)
    assert len(names) == 2 * 6 and all(name.startswith("transformer_blocks.") for name in names)


@both
def test_only_adapters_are_trainable(family, component):
    module = adapt(family, component)
    assert set(lora.trainable_parameters(module)) == set(lora.adapter_parameters(module))
    family.set_trainable(ar=True, dit=True)
    assert set(family.trainable(component)) == set(lora.adapter_parameters(module))
    family.set_trainable(ar=False, dit=False)
    assert not family.trainable(component)


def test_gradient_reaches_the_adapter_under_checkpointing(family):
    module = adapt(family, "dit")
    family.set_trainable(ar=False, dit=True)
    family.dit.enable_gradient_checkpointing()
    condition = family.dit.condition(['"a"'], torch.arange(4)[None], GRID)
    family.dit(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), condition).square().mean().backward()
    for name, param in module.named_parameters():
        assert (param.grad is not None) == (name in lora.adapter_parameters(module))


def test_init_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        module = adapt(GLMImage.load("tiny-random"), "dit", seed=seed, perturb=False)
        weights.append({name: param.clone() for name, param in lora.adapter_parameters(module).items()})
        torch.rand(3)  # someone else draws in between
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    down = [name for name in first if "lora_A" in name]
    assert all(not torch.equal(first[name], other[name]) for name in down)
    assert all(abs(first[name]).max() <= first[name].shape[1] ** -0.5 for name in down)
    assert len({first[name].flatten()[0].item() for name in down}) == len(down)
    torch.set_rng_state(state)
    adapt(GLMImage.load("tiny-random"), "ar", perturb=False)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was not touched


@both
def test_saved_folder_loads_in_peft_and_back(family, component, tmp_path):
    adapt(family, component)
    expected = OUTPUT[component](family)
    lora.save_lora(family.module(component), tmp_path)
    fresh = GLMImage.load("tiny-random")
    peft_model = PeftModel.from_pretrained(fresh.module(component), tmp_path)  # wraps the layers of fresh in place
    assert peft_model.peft_config["default"].r == 2
    torch.testing.assert_close(OUTPUT[component](fresh), expected, atol=1e-5, rtol=0)
    ours = GLMImage.load("tiny-random")
    lora.load_lora(ours.module(component), tmp_path)
    assert torch.equal(OUTPUT[component](ours), expected)
    ours.set_trainable(ar=True, dit=True)
    assert set(ours.trainable(component)) == set(lora.adapter_parameters(family.module(component)))
    lora.load_lora(ours.module(component), tmp_path)  # over an adapter that is there
    assert torch.equal(OUTPUT[component](ours), expected)


def test_merged_export_loads_in_stock_and_leaves_the_model_alone(family, tmp_path):
    adapt(family, "dit")
    adapt(family, "ar")
    before = {name: value.clone() for half in ("ar", "dit") for name, value in family.module(half).state_dict().items()}
    expected = velocity(family), log_probs(family)
    with pytest.raises(ValueError, match="merge_lora=True"):
        family.save_pretrained(tmp_path)
    family.save_pretrained(tmp_path, merge_lora=True)
    after = {name: value for half in ("ar", "dit") for name, value in family.module(half).state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(velocity(family), expected[0]) and torch.equal(log_probs(family), expected[1])
    stock = GlmImagePipeline.from_pretrained(tmp_path)
    exported = GLMImage.from_pipeline(stock)
    assert not lora.has_lora(exported.ar.model) and not lora.has_lora(exported.dit.transformer)
    torch.testing.assert_close(velocity(exported), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs(exported), expected[1], atol=1e-5, rtol=0)


def test_merge_that_fails_half_way_restores(family):
    module = adapt(family, "dit")
    before = velocity(family)
    with pytest.raises(OSError), lora.merged(module):
        assert not lora.has_lora(module)
        raise OSError("disk full")
    assert torch.equal(velocity(family), before)


def test_stock_pipeline_runs_over_adapted_modules(family):
    adapt(family, "dit")
    pipeline = family.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    tokens = torch.arange(4)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipeline(
        '"a"',
        height=64,
        width=64,
        num_inference_steps=2,
        latents=noise,
        prior_token_ids=pipeline._upsample_token_ids(tokens, *GRID),
        output_type="latent",
    ).images
    condition = family.dit.condition(['"a"'], tokens, GRID)
    assert torch.equal(
        family.dit.sample(noise, condition, family.dit.schedule(2, 64, 64), guidance_scale=1.5).final, latents
    )


def test_snapshot_of_adapters_is_small_and_gives_the_reference(family):
    reference = velocity(family)
    module = adapt(family, "dit", perturb=False)
    snapshot = ParameterSnapshot(lora.trainable_parameters(module))
    held = sum(value.numel() for value in snapshot.state_dict().values())
    assert held < 0.2 * sum(param.numel() for param in module.parameters())
    for name, param in lora.adapter_parameters(module).items():
        if "lora_B" in name:
            param.data.fill_(0.2)
    trained = velocity(family)
    assert not torch.equal(trained, reference)
    with snapshot.applied():
        assert torch.equal(velocity(family), reference)
    assert torch.equal(velocity(family), trained)


def test_adapters_are_fp32_on_a_bf16_base():
    family = GLMImage.load("tiny-random", dtype=torch.bfloat16)
    module = adapt(family, "dit")
    assert {param.dtype for param in lora.adapter_parameters(module).values()} == {torch.float32}
    assert velocity(family).dtype == torch.float32 and velocity(family).isfinite().all()
    with lora.merged(module):
        assert module.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


NAMES = {
    "ar": ["down_proj", "gate_up_proj", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"],
    "dit": ["linear", "linear_1", "linear_2", "net.2", "proj", "proj_out", "to_k", "to_out.0", "to_q", "to_v"],
}


@pytest.mark.parametrize("part", ["ar", "dit"])
def test_every_trainable_layer_has_a_name_that_is_taken(family, part):
    """By hand, from the classes' source; no name is a number, none reaches the vision tower."""
    module = family.module(part)
    assert lora.target_names(module) == NAMES[part]
    lora.check_targets(module, NAMES[part])
    named = [name for target in NAMES[part] for name in lora._reached(target, dict(module.named_modules()))]
    linear = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert sorted(named) == sorted(name for name in linear if "visual" not in name)


def test_targets_are_endings_as_in_peft_and_every_fault_is_told():
    network = torch.nn.ModuleDict(
        {"up": torch.nn.Linear(2, 2), "block": torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)})}
    )
    network["tail"] = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    network["again"] = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    assert lora.target_names(network) == ["again.1", "tail.0", "up"]
    for targets in (["up"], ["block.up", "tail.0"]):
        lora.check_targets(network, targets)
        wrapped = lora.add_lora(copy.deepcopy(network), targets, rank=1, alpha=1)
        assert wrapped == [name for name in ("up", "block.up", "tail.0") if any(name.endswith(t) for t in targets)]
    faults = "'p' names no linear layer.*'0' reaches again.0, a LayerNorm.*'all-linear' names.*'.\\*up' names"
    with pytest.raises(ValueError, match=faults + ".*by their endings: again.1, tail.0, up$"):
        lora.check_targets(network, ["p", "0", "all-linear", ".*up"])
    with pytest.raises(ValueError, match="must be a list"):
        lora.check_targets(network, "up")


def test_mistakes_are_named(family, tmp_path):
    module = family.module("dit")
    with pytest.raises(ValueError, match="'to_x' names no linear layer"):
        lora.add_lora(module, ["to_q", "to_x"], rank=2, alpha=4)
    with pytest.raises(ValueError, match="stays frozen"):
        lora.add_lora(family.ar.model, ["qkv"], rank=2, alpha=4)
    with pytest.raises(ValueError, match="rank >= 1"):
        lora.add_lora(module, ["to_q"], rank=0, alpha=4)
    assert not lora.has_lora(module)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora.save_lora(module, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        lora.load_lora(module, tmp_path)
    lora.add_lora(module, ["to_q"], rank=2, alpha=4)
    with pytest.raises(ValueError, match="already"):
        lora.add_lora(module, ["to_q"], rank=2, alpha=4)
    lora.save_lora(module, tmp_path)
    other = GLMImage.load("tiny-random").module("dit")
    lora.add_lora(other, ["to_q"], rank=4, alpha=4)
    with pytest.raises(ValueError, match="does not fit"):
        lora.load_lora(other, tmp_path)
