"""Runs that start from the adapters of others: merged into the model, or trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_training.engine.adapters import adapter_digests, check_adapters
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import build_family, load_family
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import add_lora, has_lora, merged
from glm_training.models.sdxl.family import SDXL
from glm_training.utils.distributed import World
from tests.config.building import issues
from tests.runs import config_of, trainer_of
from tests.same import assert_identical

LORA = ["lora.enabled=true", "lora.rank=2", "lora.alpha=8"]
TARGETS = {"ar": ["q_proj", "down_proj"], "dit": ["to_q", "ff.net.2"]}
NAMED = [f"lora.{part}_targets=[{', '.join(names)}]" for part, names in TARGETS.items()]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def trained_adapter(folder: Path, part: str, seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """An adapter of `part` with weights of every kind, in `folder`; and the whole weights of the model with it."""
    family = GLMImage.load("tiny-random", dtype=torch.float32, seed=3)
    module = family.module(part)
    add_lora(module, TARGETS[part], rank, 8.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in module.named_parameters():
            if ".lora_B." in name:
                param.copy_(torch.randn(param.shape, generator=generator) / 8)
    family.save_lora(part, folder)
    with merged(module):
        return weights(module)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints of adapters of both halves, of which the second is pointed at."""
    for step in (1, 2):
        checkpoint = tmp_path / "runs" / "x" / "checkpoints" / f"step-{step:06d}"
        for part in ("ar", "dit"):
            trained_adapter(checkpoint / f"lora_{part}", part, seed=step)
    (tmp_path / "runs" / "x" / "checkpoints" / "latest").write_text("step-000002")
    return tmp_path / "runs" / "x"


# -- merged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-000002"])
def test_adapters_of_a_run_are_merged_as_its_pipeline_has_them(tmp_path: Path, run: Path, place: str) -> None:
    config = config_of(tmp_path, f"model.adapters=[{run / place}]", "model.component=dit")
    family = build_family(config, World())
    for part in ("ar", "dit"):  # of the half that is not trained too
        expected = trained_adapter(tmp_path / "again" / part, part, seed=2)
        assert not has_lora(family.module(part)) and "peft_config" not in vars(family.module(part))
        assert_identical(weights(family.module(part)), expected)
    assert len(check_adapters(config)) == 2


def test_what_is_trained_whole_takes_adapters_in_full_precision(tmp_path: Path, run: Path) -> None:
    """W + 4 B A of a model in bf16, without the rounding of bf16, which is 4e-3 of W."""
    config = config_of(tmp_path, f"model.adapters=[{run}]", "model.component=dit", "model.torch_dtype=bfloat16")
    family = build_family(config, World())
    plain = weights(load_family(config, World()).module("dit"))
    found = load_file(run / "checkpoints/step-000002/lora_dit/adapter_model.safetensors")
    downs = [name for name in found if name.endswith(".lora_A.weight")]
    assert downs
    for name in downs:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        added = 4 * found[name.replace("lora_A", "lora_B")] @ found[name]
        expected = plain[f"{layer}.weight"].float() + added
        merged_weight = dict(family.module("dit").named_parameters())[f"{layer}.weight"]
        assert merged_weight.dtype == torch.float32
        torch.testing.assert_close(merged_weight.detach(), expected, atol=1e-6, rtol=1e-6)


def test_adapters_are_merged_one_after_the_other_and_new_ones_trained(tmp_path: Path, run: Path) -> None:
    """Of adapters that do not see each other the sum: W + 4 B1 A1 + 4 B2 A2."""
    folders = [run / "checkpoints" / f"step-00000{step}" / "lora_dit" for step in (1, 2)]
    config = config_of(tmp_path, f"model.adapters=[{folders[0]}, {folders[1]}]", *LORA, *NAMED)
    family = build_family(config, World())
    name = next(name for name, _ in family.module("dit").named_modules() if name.endswith("attn1.to_q"))
    base = load_family(config, World()).module("dit").get_submodule(name).weight
    expected = base.detach().clone()
    for folder in folders:
        saved = load_file(folder / "adapter_model.safetensors")
        down, up = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = expected + 4.0 * (up @ down)
    found = family.module("dit").get_submodule(name)
    assert torch.equal(found.get_base_layer().weight, expected) and not found.lora_B["default"].weight.any()
    told = "adapters of the dit that this run saves belong on the model with those that it merged"
    assert check_adapters(config)[2:] == [told]
    assert set(family.trainable("dit")) == {n for n, _ in family.module("dit").named_parameters() if ".lora_" in n}


def test_sdxls_adapters_are_merged_from_diffusers_files(tmp_path: Path) -> None:
    family = SDXL.load("tiny-random", dtype=torch.float32, seed=3)
    add_lora(family.module("unet"), ["to_q"], 2, 8.0, seed=1)
    with torch.no_grad():
        for name, param in family.module("unet").named_parameters():
            if ".lora_B." in name:
                param.fill_(0.25)
    family.save_lora("unet", tmp_path / "adapter")
    with merged(family.module("unet")):
        expected = weights(family.module("unet"))
    keys = ["model.family=sdxl", "model.component=unet", f"model.adapters=[{tmp_path / 'adapter'}]"]
    keys += ["training.method=dpo", f"data.pairs={tmp_path}", "data.prompts_file=null", "data.target_images_dir=null"]
    config = config_of(tmp_path, *keys, "reward.metrics=null", "reward.enabled=false", "model.dit.guidance_scale=1.5")
    assert check_adapters(config) == [f"{tmp_path / 'adapter'} is merged into the unet before training"]
    loaded = build_family(config, World()).module("unet")
    assert_identical(weights(loaded), expected)
    assert not vars(loaded).keys() & {"peft_config", "_hf_peft_config_loaded"}
    add_lora(loaded, ["to_k"], 2, 2.0)  # nothing of the merged one is left in the way


def rewritten(run: Path, rename: Callable[[str], str], told: dict[str, object] | None = None) -> Path:
    """The adapter of the DiT of a run in a folder `lora_dit` of its own, in diffusers' file, its weights renamed."""
    saved = load_file(run / "checkpoints" / "step-000002" / "lora_dit" / "adapter_model.safetensors")
    folder = run.parent / "other" / "lora_dit"
    folder.mkdir(parents=True)
    plain = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in told.items()})} if told else None
    weights_file = folder / "pytorch_lora_weights.safetensors"
    save_file({rename(name): value for name, value in plain.items()}, weights_file, metadata)
    return folder


@pytest.mark.parametrize(
    ("told", "scales"),
    [
        (None, (1.0, 1.0)),  # diffusers takes alpha for the rank
        ({"r": 2, "lora_alpha": 8}, (4.0, 4.0)),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, (8 / 2**0.5, 8 / 2**0.5)),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, (0.5, 4.0)),
    ],
)
def test_glm_images_adapters_are_merged_from_diffusers_files(
    tmp_path: Path, run: Path, told: dict[str, object] | None, scales: tuple[float, float]
) -> None:
    folder = rewritten(run, lambda name: f"transformer.{name}", told)
    config = config_of(tmp_path, f"model.adapters=[{folder}]")
    assert check_adapters(config) == [f"{folder} is merged into the dit before training"]
    found, plain = (weights(make(config, World()).module("dit")) for make in (build_family, load_family))
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    adapted = {name.split(".lora_")[0] for name in saved}
    for layer in adapted:
        scale = scales[0] if layer.endswith("attn1.to_q") else scales[1]
        added = scale * (saved[f"{layer}.lora_B.weight"] @ saved[f"{layer}.lora_A.weight"])
        name = f"{layer.removeprefix('transformer.')}.weight"
        # the bound: one rounding of a sum of a few products of order 1, in fp32
        torch.testing.assert_close(found.pop(name), plain.pop(name) + added, atol=1e-6, rtol=1e-6)
    assert len(adapted) > 1
    assert_identical(found, plain)


MALFORMED: dict[str, tuple[Callable[[str], str], str]] = {
    "kohya's names": (
        lambda name: "lora_unet_" + name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        "has weights named as kohya's scripts do, as lora_unet_.*: save it in diffusers' or PEFT's format",
    ),
    "diffusers' older names": (
        lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        "has weights named as kohya's scripts do",
    ),
    "no B": (
        lambda name: name.replace("to_q.lora_B", "to_k.lora_B"),
        r"is not whole: .*to_k has A None and B \[\d+, 2]",
    ),
    "more than matrices": (
        lambda name: name.replace("lora_B.weight", "lora_magnitude_vector"),
        "has more than the matrices A and B of linear layers: .*lora_magnitude_vector",
    ),
}


@pytest.mark.parametrize("here", ["here", "not here"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_adapter_is_told_before_the_model_is_loaded(tmp_path: Path, run: Path, kind: str, here: str) -> None:
    """Whether the model is on this machine or yet to come."""
    rename, said = MALFORMED[kind]
    folder = rewritten(run, rename)
    name = [] if here == "here" else ["model.name=nobody/has-this"]
    with pytest.raises(SettingsError, match=said):
        check_adapters(config_of(tmp_path, f"model.adapters=[{folder}]", *name))


def test_an_adapter_of_another_base_is_told_before_the_model_is_loaded(tmp_path: Path, run: Path) -> None:
    folder = rewritten(run, lambda name: f"unet.down_blocks.{name}")
    with pytest.raises(SettingsError, match="does not fit the dit of this model: .*first down_blocks."):
        check_adapters(config_of(tmp_path, f"model.adapters=[{folder}]"))


# -- trained on --------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_on_from_what_they_were(tmp_path: Path, run: Path) -> None:
    family = build_family(config_of(tmp_path, f"lora.start_from={run}", *LORA, *NAMED), World())
    for part in ("ar", "dit"):
        saved = load_file(run / "checkpoints" / "step-000002" / f"lora_{part}" / "adapter_model.safetensors")
        own = {name.replace(".default.", "."): value for name, value in family.trainable(part).items()}
        assert_identical(own, {name.removeprefix("base_model.model."): value for name, value in saved.items()})


def test_the_reference_of_adapters_that_are_trained_on_is_what_they_were(tmp_path: Path, run: Path) -> None:
    """The KL is to the model that the run starts from; fresh adapters are switched off for that."""
    keys = ["model.component=dit", *LORA, *NAMED, "reward.grpo.kl_coef=0.1"]
    trainer = trainer_of(tmp_path, *keys, f"lora.start_from={run}")
    part = trainer.parts["dit"]
    before = {name: value.detach().clone() for name, value in part.parameters.items()}
    with torch.no_grad():
        for value in part.parameters.values():
            value.add_(1.0)
    with part.as_reference():
        assert_identical(dict(part.parameters), before)
    fresh = trainer_of(tmp_path, *keys).parts["dit"]
    with fresh.as_reference():
        layers = [layer for layer in fresh.component.modules() if hasattr(layer, "disable_adapters")]
        assert layers and all(layer.disable_adapters for layer in layers)


def test_a_half_without_an_earlier_adapter_begins_with_a_fresh_one_and_is_told(tmp_path: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000002" / "lora_dit")
    config = config_of(tmp_path, f"lora.start_from={run}", *LORA, *NAMED)
    assert check_adapters(config)[1] == f"{run} has no adapter of the dit: that begins with a fresh one"
    module = build_family(config, World()).module("dit")
    assert not any(param.any() for name, param in module.named_parameters() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["lora.rank=3"], "is another one: set lora.rank: 2"),
        (["lora.alpha=3"], "is another one: set lora.alpha: 8"),
        (["lora.dit_targets=[to_k]"], "is not on the layers of lora.dit_targets: "),
    ],
)
def test_adapters_of_another_shape_are_told_before_the_model_is_loaded(
    tmp_path: Path, run: Path, keys: list[str], said: str
) -> None:
    keys = ["model.component=dit", *LORA, *NAMED, *keys]
    with pytest.raises(SettingsError, match=said):
        check_adapters(config_of(tmp_path, f"lora.start_from={run}", *keys))


SAYS_NOTHING: dict[str, str] = {}


@pytest.mark.parametrize(
    ("told", "own", "said"),
    [
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, [], "set lora.alpha: 11.3137$"),  # 8 / sqrt 2 = 11.3137 / 2
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, ["lora.alpha=11.3137"], None),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 4}}, [], "several ranks or strengths.*model.adapters$"),
        (SAYS_NOTHING, [], "set lora.alpha: 2$"),
        (SAYS_NOTHING, ["lora.rank=4", "lora.alpha=2"], "set lora.rank: 2$"),
        (SAYS_NOTHING, ["lora.alpha=2"], None),
    ],
)
def test_adapters_of_others_keep_their_strength(
    tmp_path: Path, run: Path, told: dict[str, object], own: list[str], said: str | None
) -> None:
    """As PEFT writes them; or as diffusers does, which takes alpha for the rank where nobody tells it."""
    folder = run / "checkpoints" / "step-000002" / "lora_dit"
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if told:
        settings.write_text(json.dumps(json.loads(settings.read_text()) | told))
    else:
        weights = {name.replace("base_model.model.", "transformer."): value for name, value in load_file(file).items()}
        save_file(weights, folder / "pytorch_lora_weights.safetensors")
        file.unlink()
        settings.unlink()
    config = config_of(tmp_path, "model.component=dit", *LORA, *NAMED, *own, f"lora.start_from={folder}")
    if said is None:
        assert check_adapters(config) == [f"{folder} is what the adapters of the dit start from"]
        return
    with pytest.raises(SettingsError, match=said):
        check_adapters(config)


# -- what cannot be meant ----------------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_told_before_the_model_is_loaded(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-000001" / "lora_ar", tmp_path / "lora_dit")
    config = config_of(tmp_path, f"model.adapters=[{tmp_path / 'lora_dit'}]")
    with pytest.raises(
        SettingsError, match=r"model.adapters: .*lora_dit does not fit the dit of this model: \d+ weights"
    ):
        check_adapters(config)


def test_places_without_adapters_are_told_all_at_once(tmp_path: Path) -> None:
    GLMImage.load("tiny-random").save_pretrained(tmp_path / "whole" / "checkpoints" / "step-000005" / "pipeline")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "whole", tmp_path / "sdxl")
    (tmp_path / "sdxl" / "checkpoints" / "step-000005" / "lora_unet").mkdir()
    (tmp_path / "sdxl" / "checkpoints" / "step-000005" / "lora_unet" / "pytorch_lora_weights.safetensors").touch()
    places = ", ".join(str(tmp_path / name) for name in ("whole", "empty", "gone", "sdxl"))
    config = config_of(tmp_path, f"model.adapters=[{places}]")
    with pytest.raises(ModelLoadError) as caught:
        check_adapters(config)
    first, second, third, fourth = str(caught.value).splitlines()
    assert "has a whole model and no adapters: set model.name to " in first and "step-000005" in first
    assert (
        f"there are no adapters in {tmp_path / 'empty'}: name a checkpoint, or a run, with lora_ar or lora_dit in it"
        in second
    )
    assert str(tmp_path / "gone") in third
    assert fourth.endswith("sdxl has adapters of other parts, lora_unet: name one with lora_ar or lora_dit")


def test_a_damaged_adapter_is_named(tmp_path: Path, run: Path) -> None:
    file = run / "checkpoints" / "step-000002" / "lora_ar" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="model.adapters: the adapter in .*lora_ar cannot be read"):
        check_adapters(config_of(tmp_path, f"model.adapters=[{run}]"))


def test_what_no_part_can_take_is_refused() -> None:
    assert issues(lora={"start_from": "runs/x"})[0].paths == ("lora.start_from", "lora.enabled")
    vgt = {"model": {"family": "vgt", "adapters": ["runs/x"]}, "data": {"images": "t"}}
    assert issues(**vgt)[0].paths == ("model.adapters", "model.family")


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_resume_from_other_adapters_is_refused(tmp_path: Path, run: Path) -> None:
    """The run whose adapters were merged has gone on since: its newest are others."""
    keys = ["training.use_reward=false", "model.component=ar", "training.max_steps=1"]
    keys += [f"model.adapters=[{run}]", "lora.enabled=true"]
    trainer_of(tmp_path, *keys).train()
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    resume = [*keys, "training.max_steps=2", f"checkpoint.resume_from={saved}"]
    assert len(adapter_digests(config_of(tmp_path, *keys))) == 2
    trained_adapter(run / "checkpoints" / "step-000003" / "lora_ar", "ar", seed=3)
    (run / "checkpoints" / "latest").write_text("step-000003")
    with pytest.raises(SettingsError) as caught:
        trainer_of(tmp_path, *resume)
    lines = str(caught.value).splitlines()
    assert any("model.adapters" in line and "step-000002/lora_ar: removed" in line for line in lines)
    assert any("model.adapters" in line and "step-000003/lora_ar: added" in line for line in lines)
    (run / "checkpoints" / "latest").write_text("step-000002")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    trainer_of(tmp_path, *resume).train()
    assert json.loads((saved.parent / "step-000002" / "manifest.json").read_text())
