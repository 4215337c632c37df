"""Adapters have their full strength in every reader: PEFT, diffusers, and those that know tensors alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glm_training.config import load_config
from glm_training.export.fresh import _adapters, _same_strength
from glm_training.export.lora import DIFFUSERS_FILE, KOHYA_FILE, kohya_name, require_change, sgm_name, write_adapters
from glm_training.export.source import Adapter, ExportError, Source
from glm_training.models.adapters import starting_adapters
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.lora import ADAPTER, adapter_parameters, add_lora, described
from glm_training.models.run_folders import adapters_in
from glm_training.models.sdxl.family import SDXL
from glm_training.models.sdxl.tiny import build_tiny

ROOT = Path(__file__).parents[2]
RANK, ALPHA = 3, 7.0  # a strength that no file of 16 bits, and no forgotten alpha, comes to by chance
EVERY_LINEAR = ["to_q", "to_out.0", "proj_in", "net.0.proj", "net.2", "time_emb_proj", "linear_1", "linear_2"]


def trained(module: nn.Module, part: str, targets: list[str]) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter of random matrices, and alpha / rank B A of each layer."""
    add_lora(module, targets, RANK, ALPHA)
    generator = torch.Generator().manual_seed(0)
    for name, param in adapter_parameters(module).items():
        if ".lora_B." in name:
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    weights = {name.replace(f".{ADAPTER}.", "."): p.detach().clone() for name, p in adapter_parameters(module).items()}
    adapter = Adapter(part, weights, described(module.peft_config[ADAPTER]))
    return adapter, {layer: ALPHA / RANK * (b @ a) for layer, (a, b) in adapter.layers().items()}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    family, folder = SDXL.load("tiny-random"), tmp_path_factory.mktemp("sdxl")
    adapter, deltas = trained(family.module("unet"), "unet", EVERY_LINEAR)
    write_adapters(folder, [adapter], None, "owner/base", layers_per_block=1)
    return folder, deltas


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    family, folder, every = GLMImage.load("tiny-random"), tmp_path_factory.mktemp("glm"), {}
    adapters = []
    for part in ("ar", "dit"):
        adapter, every[part] = trained(family.module(part), part, list(family.lora_targets(part)))
        adapters.append(adapter)
    write_adapters(folder, adapters, None, None, layers_per_block=None)
    return folder, every


def deltas_of(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """What merging has added to each weight."""
    old = dict(before.named_parameters())
    return {
        name.removesuffix(".weight"): value.detach() - old[name].detach()
        for name, value in after.named_parameters()
        if not torch.equal(value, old[name])
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5, name  # sums of three terms of about 1, and weights of up to 4


def plain_reader(file: Path) -> dict[str, Tensor]:
    """W + alpha / rank B A of each layer, from tensors alone; alpha is the rank where there is none."""
    tensors, found = load_file(file), {}
    for name, down in tensors.items():
        end = next((end for end in (".lora_down.weight", ".lora_A.weight") if name.endswith(end)), None)
        if end is not None:
            layer = name.removesuffix(end)
            up = tensors[layer + end.replace("down", "up").replace("_A", "_B")]
            found[layer] = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down)))) / len(down) * (up @ down)
    return found


@pytest.mark.parametrize("file", [KOHYA_FILE, DIFFUSERS_FILE])
def test_a_reader_of_tensors_alone(sdxl, glm, file):
    folder, deltas = sdxl
    found = plain_reader(folder / file)
    if file == KOHYA_FILE:
        same(found, {kohya_name(layer, 1): value for layer, value in deltas.items()})
    else:
        same(found, {f"unet.{layer}": value for layer, value in deltas.items()})
    folder, every = glm
    found = plain_reader(folder / file)
    if file == KOHYA_FILE:
        same(found, {kohya_name(layer, None): value for layer, value in every["dit"].items()})
    else:
        same(found, {f"transformer.{layer}": value for layer, value in every["dit"].items()})


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("file", [KOHYA_FILE, DIFFUSERS_FILE])
def test_stock_sdxl(sdxl, tmp_path, file, header):
    """With the header of the file, in which alpha stands, and without any."""
    folder, deltas = sdxl
    place = folder / file
    if not header:
        place = tmp_path / file
        save_file(load_file(folder / file), place)
    stock, before = build_tiny(), build_tiny()
    stock.load_lora_weights(str(place.parent), weight_name=file)
    stock.fuse_lora()
    stock.unload_lora_weights()
    same(deltas_of(before.unet, stock.unet), deltas)


def test_stock_glm_image(glm):
    """diffusers reads the DiT half's file, transformers and PEFT the AR half's folder."""
    folder, every = glm
    before, stock = GLMImage.load("tiny-random"), GLMImage.load("tiny-random").to_pipeline()
    stock.transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=DIFFUSERS_FILE)
    stock.transformer.fuse_lora()
    stock.transformer.unload_lora()
    same(deltas_of(before.module("dit"), stock.transformer), every["dit"])
    merged = PeftModel.from_pretrained(stock.vision_language_encoder, str(folder / "lora_ar")).merge_and_unload()
    same(deltas_of(before.module("ar"), merged), every["ar"])


def test_our_own_readers(sdxl, glm):
    for (folder, deltas), parts, family in ((sdxl, ("unet",), SDXL), (glm, ("ar", "dit"), GLMImage)):
        every = {"unet": deltas} if parts == ("unet",) else deltas
        for adapter in starting_adapters("model.adapters", [str(folder)], parts):
            assert (adapter.rank, adapter.alpha) == (RANK, ALPHA)
            weights = adapter.weights()
            for layer in adapter.layers():
                a, b = (weights[f"{layer}.lora_{side}.weight"] for side in "AB")
                assert torch.allclose(adapter.scale(layer) * (b @ a), every[adapter.part][layer], atol=1e-6)
        loaded = family.load("tiny-random")
        for part in parts:
            assert adapters_in(folder, [part], "--lora") == {part: folder / f"lora_{part}"}
            loaded.load_lora(part, folder / f"lora_{part}")


def test_what_the_headers_and_settings_say(sdxl):
    folder, _ = sdxl
    settings = json.loads((folder / "lora_unet/adapter_config.json").read_text())
    assert settings["r"] == RANK and settings["lora_alpha"] == ALPHA
    assert settings["base_model_name_or_path"] == "owner/base"
    with safe_open(folder / KOHYA_FILE, "pt") as file:
        told = file.metadata()
    assert told["ss_network_dim"] == "3" and told["ss_network_alpha"] == "7"
    with safe_open(folder / DIFFUSERS_FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == RANK  # alpha is in B


def test_names_of_sdxl_as_kohya_knows_them():
    """Two layers per block, as the real one has; places as in the published table of its blocks."""
    table = {
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"
        ),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
            "middle_block.1.transformer_blocks.0.ff.net.0.proj"
        ),
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k": "output_blocks.3.1.transformer_blocks.1.attn1.to_k",
        "up_blocks.2.resnets.2.time_emb_proj": "output_blocks.8.0.emb_layers.1",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
    }
    assert {layer: sgm_name(layer, 2) for layer in table} == table
    assert kohya_name("down_blocks.1.attentions.0.proj_in", 2) == "lora_unet_input_blocks_4_1_proj_in"
    with pytest.raises(ExportError, match=re.escape("conv_in has no name")):
        sgm_name("conv_in", 2)


def test_half_precision_rounds_once(tmp_path):
    family = SDXL.load("tiny-random")
    adapter, deltas = trained(family.module("unet"), "unet", ["to_q"])
    write_adapters(tmp_path, [adapter], torch.bfloat16, None, layers_per_block=1)
    layers = adapter.layers()
    for file in (KOHYA_FILE, DIFFUSERS_FILE):
        found = load_file(tmp_path / file)
        assert {value.dtype for name, value in found.items() if not name.endswith("alpha")} == {torch.bfloat16}
    plain = load_file(tmp_path / DIFFUSERS_FILE)
    for layer, (a, b) in layers.items():
        assert torch.equal(plain[f"unet.{layer}.lora_A.weight"], a.bfloat16())
        assert torch.equal(plain[f"unet.{layer}.lora_B.weight"], (ALPHA / RANK * b).bfloat16())


@pytest.mark.parametrize("size", [1e-5, 1e-7])
def test_small_numbers_in_half_precision_are_no_fault(tmp_path, size):
    """Below 6.1e-5 the steps of fp16 do not shrink any more."""
    family = SDXL.load("tiny-random")
    adapter, _ = trained(family.module("unet"), "unet", ["to_q"])
    for name, weight in adapter.weights.items():
        if "lora_B" in name:
            weight.mul_(10 * size)
    write_adapters(tmp_path, [adapter], torch.float16, None, layers_per_block=1)
    (peft,) = starting_adapters("x", [str(tmp_path / "lora_unet")], ["unet"])
    _same_strength(tmp_path, "unet", peft, 1)
    weaker = load_file(tmp_path / DIFFUSERS_FILE)
    save_file(
        {name: value / 2 if "lora_B" in name else value for name, value in weaker.items()}, tmp_path / DIFFUSERS_FILE
    )
    if size > 1e-6:  # else the steps are as large as the numbers
        with pytest.raises(ExportError, match="has not the strength"):
            _same_strength(tmp_path, "unet", peft, 1)


@pytest.mark.parametrize(
    ("side", "value", "why"),
    [("B", 0.0, "changes nothing"), ("A", 0.0, "changes nothing"), ("A", float("nan"), "not finite")],
)
def test_adapters_that_are_none(sdxl, side, value, why):
    family = SDXL.load("tiny-random")
    adapter, _ = trained(family.module("unet"), "unet", ["to_q"])
    for name, weight in adapter.weights.items():
        if f"lora_{side}" in name:
            weight.fill_(value)
    with pytest.raises(ExportError, match=why):
        require_change(adapter)


def test_adapters_that_a_dtype_made_zero_are_found_in_their_file(tmp_path):
    family = SDXL.load("tiny-random")
    adapter, _ = trained(family.module("unet"), "unet", ["to_q"])
    for name, weight in adapter.weights.items():
        if "lora_B" in name:
            weight.mul_(1e-9)
    config = load_config(ROOT / "configs/sdxl_dpo_lora_tiny.yaml", ["model.name=tiny-random"])
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        write_adapters(folder, [adapter], dtype, None, layers_per_block=1)
        source: Any = Source(tmp_path, None, config, "tiny-random")  # type: ignore[arg-type]
        if dtype == torch.bfloat16:
            assert "every matrix has a linear layer of its shape in the model" in list(_adapters(source, folder))
        else:
            with pytest.raises(ExportError, match="--dtype cannot hold"):
                list(_adapters(source, folder))


def test_the_stock_pipeline_takes_the_folder_by_itself(sdxl):
    """`load_lora_weights(FOLDER)` finds its file beside kohya's, as it does in a repository of the hub."""
    folder, _ = sdxl
    stock: StableDiffusionXLPipeline = build_tiny()
    stock.load_lora_weights(str(folder))
    (config,) = stock.unet.peft_config.values()
    assert config.r == config.lora_alpha == RANK
