"""Every family and format comes out whole: read again in another process, it draws what the trainer drew."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_training.engine.agreement import weights_digest
from glm_training.export import card, fresh, verify
from glm_training.export.drawing import drawing_of, stock_picture
from glm_training.export.formats import Wanted
from glm_training.export.models import base_model, trainers_model
from glm_training.export.source import ExportError, Source
from glm_training.models.family import read_few_steps
from glm_training.models.sdxl.family import SDXL
from tests import dmdr_runs, preference_runs, runs, vgt_runs
from tests.export.exporting import DRAWN, exported, told

BIT_FOR_BIT = "it draws what the trainer draws with these weights, bit for bit in fp32"
OWN = "these are the pictures in samples/step-00000"
STOCK = "so does the stock pipeline's own call"
LORA = ["lora.enabled=true", "lora.rank=2", "lora.alpha=4"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Both halves of a GLM-Image with adapters; two steps, the checkpoint has no pipeline."""
    folder = tmp_path_factory.mktemp("glm")
    trainer = runs.trainer_of(folder, *DRAWN, *LORA, "checkpoint.save_lora_only=true", "training.ema.decay=0.5")
    trainer.train()
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The DiT half trained whole, with an average of its weights that pipelines do not show."""
    folder = tmp_path_factory.mktemp("whole")
    keys = ["model.component=dit", "training.ema.decay=0.5", "training.ema.export=false", "training.ema.evaluate=false"]
    runs.trainer_of(folder, *DRAWN, *keys).train()
    return folder / "run"


def test_adapters_of_both_halves(adapters, tmp_path):
    lines = exported(adapters, tmp_path / "out", "lora")
    told(lines, BIT_FOR_BIT, STOCK, "noise and tokens", OWN, "its pictures differ from those of tiny-random")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        "README.md",
        "kohya_lora.safetensors",
        "lora_ar/adapter_config.json",
        "lora_ar/adapter_model.safetensors",
        "lora_dit/adapter_config.json",
        "lora_dit/adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    ]


def test_that_the_run_drew_with_fewer_bits_is_told(adapters, tmp_path, monkeypatch):
    """The files of a run over weights in 4 bits are those of one over full ones, but for its configuration."""
    source = Source.read(adapters)
    assert source.rounded_base is None
    model = source.config.model.model_copy(update={"quantization": "nf4"})
    source = replace(source, config=source.config.model_copy(update={"model": model}))
    wanted = Wanted(source, "lora", "weights", False, None)
    monkeypatch.setattr(verify, "_in_another_process", lambda *_: [])
    lines = verify.verified(wanted, tmp_path, draw=False)
    told(lines, "adapters trained over base weights in nf4, and meant here for those in full")
    assert f"The adapters were {source.rounded_base}." in card._what(wanted)
    pictures = torch.zeros(1, 3, 64, 64)
    monkeypatch.setattr(verify, "own_pictures", lambda *_: pictures)
    told(verify._beside_samples(wanted, None, pictures + 0.5), "it drew with base weights in nf4")


def test_merged_adapters_in_half_precision(adapters, tmp_path):
    lines = exported(adapters, tmp_path / "out", "pipeline", merge=True, dtype=torch.bfloat16)
    told(lines, BIT_FOR_BIT, STOCK, OWN, "rounding to bfloat16 moves its pictures by")
    weights = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in weights)


def test_the_weights_under_training_of_a_run_that_shows_its_average(adapters, tmp_path):
    told(exported(adapters, tmp_path / "out", "lora", ema=False), BIT_FOR_BIT, "samples of these weights are not here")
    raw = load_file(tmp_path / "out/lora_dit/adapter_model.safetensors")
    shown = load_file(adapters / "checkpoints/step-000002/lora_dit/adapter_model.safetensors")
    assert raw.keys() == shown.keys() and any(not torch.equal(raw[name], shown[name]) for name in raw)


def test_a_half_trained_whole(whole, tmp_path):
    told(exported(whole, tmp_path / "plain", "pipeline"), BIT_FOR_BIT, STOCK, OWN)
    told(
        exported(whole, tmp_path / "average", "safetensors", ema=True), BIT_FOR_BIT, "differ from those of tiny-random"
    )
    checkpoint, file = whole / "checkpoints/step-000002", "transformer/diffusion_pytorch_model.safetensors"
    plain, average = load_file(tmp_path / "plain" / file), load_file(tmp_path / "average" / file)
    states = {kind: load_file(checkpoint / f"states/dit_{kind}.safetensors") for kind in ("weights", "ema")}
    assert plain.keys() == average.keys() == states["ema"].keys()
    assert all(torch.equal(plain[name], states["weights"][name]) for name in plain)
    assert all(torch.equal(average[name], states["ema"][name]) for name in plain)
    assert any(not torch.equal(plain[name], average[name]) for name in plain)
    assert sorted(path.name for path in (tmp_path / "average").iterdir()) == ["README.md", "transformer"]


@pytest.mark.parametrize("merged", [False, True])
def test_parts_alone_in_half_precision_are_drawn_in_the_rest_as_it_is(whole, adapters, tmp_path, merged):
    """What is not in the export is not rounded with it."""
    run, parts = (adapters, ["transformer", "vision_language_encoder"]) if merged else (whole, ["transformer"])
    lines = exported(run, tmp_path / "out", "safetensors", merge=merged, dtype=torch.bfloat16)
    told(lines, BIT_FOR_BIT, STOCK, OWN, "rounding to bfloat16 moves its pictures by")
    for part in parts:
        (file,) = (tmp_path / "out" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Adapters of the AR half beside a DiT half that is trained whole; the checkpoint has a pipeline."""
    folder = tmp_path_factory.mktemp("mixed")
    keys = ["lora.ar.enabled=true", "lora.ar.rank=2", "lora.ar.alpha=4.0", "training.max_steps=1"]
    runs.trainer_of(folder, *DRAWN, *keys).train()
    return folder / "run"


def test_adapters_beside_a_half_trained_whole(mixed, tmp_path):
    """They are exported alone, which is told, and held against the model that the run began with, with them."""
    lines = exported(mixed, tmp_path / "out", "lora")
    told(lines, BIT_FOR_BIT, STOCK, "the dit, trained whole, is not in it (--format safetensors --merge)")
    assert not any(OWN in line for line in lines) and not (tmp_path / "out/lora_dit").exists()
    text = (tmp_path / "out/README.md").read_text()
    assert "LoRA adapters for the ar of" in text and "The dit was trained whole beside them" in text
    told(exported(mixed, tmp_path / "both", "safetensors", merge=True), BIT_FOR_BIT, OWN)
    assert "training LoRA adapters of its ar and the dit, which" in (tmp_path / "both/README.md").read_text()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_adapters_are_merged_into_the_base_that_is_named(mixed, tmp_path, dtype):
    """And not taken from the pipeline of the checkpoint, where they are merged into that of the run."""
    other = base_model(Source.read(mixed), torch.float32)
    for parameter in other.module("ar").parameters():
        parameter.data += 0.25
    other.save_pretrained(tmp_path / "base")
    exported(mixed, tmp_path / "out", "pipeline", merge=True, base=str(tmp_path / "base"), dtype=dtype)
    found = load_file(tmp_path / "out/vision_language_encoder/model.safetensors")
    wanted = load_file(tmp_path / "base/vision_language_encoder/model.safetensors")
    added = {
        f"{layer}.weight": 4 / 2 * (b @ a)
        for layer, (a, b) in Source.read(mixed).adapter("ar", "weights").layers().items()
    }
    assert found.keys() == wanted.keys() and added.keys() < wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value + added.get(name, 0), rtol=1e-6, atol=1e-7), name


@pytest.fixture(scope="module")
def dpo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    preference_runs.trainer_of(folder, "sdxl", *DRAWN, "lora.alpha=6.0").train()  # 6 / 4 is no power of two
    return folder / "run"


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory) -> Path:
    """Adapters on a model in bf16, and a pipeline in which they are merged and rounded."""
    folder = tmp_path_factory.mktemp("bf16")
    keys = ("model.torch_dtype=bfloat16", "training.max_steps=1", "checkpoint.save_lora_only=false")
    preference_runs.trainer_of(folder, "sdxl", *DRAWN, *keys).train()
    return folder / "run"


@pytest.mark.parametrize("with_pipeline", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adapters_are_merged_in_fp32_and_rounded_once(half_precision, tmp_path, with_pipeline, dtype):
    """W of the model in bf16, and alpha / rank B A: not what was rounded to bf16 for the pipeline of the run."""
    folder = shutil.copytree(Source.read(half_precision).folder, tmp_path / "step-000001")
    if not with_pipeline:
        shutil.rmtree(folder / "pipeline")
    source = Source.read(folder)
    base, adapter = base_model(source, torch.bfloat16), source.adapter("unet", "weights")
    exported(folder, tmp_path / "out", "safetensors", merge=True, dtype=dtype, draw=dtype == torch.float32)
    found = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    for layer, (a, b) in adapter.layers().items():
        weight = base.module("unet").get_parameter(f"{layer}.weight").detach()
        exact = weight.float() + adapter.scale * (b @ a)
        assert torch.equal(found[f"{layer}.weight"], exact.to(dtype)), layer
        assert not torch.equal(exact, exact.bfloat16().float()), layer


def test_sdxl_adapters(dpo, tmp_path):
    lines = exported(dpo, tmp_path / "out", "lora")
    told(lines, "it draws what the trainer draws with these weights", STOCK, OWN, "by their tensors alone (unet)")


def test_sdxl_adapters_merged(dpo, tmp_path):
    lines = exported(dpo, tmp_path / "out", "safetensors", merge=True)
    told(lines, BIT_FOR_BIT, STOCK, "merging them moves its pictures by")
    base = SDXL.load("tiny-random", seed=3).module("unet").state_dict()
    merged = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    adapter = Source.read(dpo).adapter("unet", "weights")
    added = {f"{layer}.weight": 6 / 4 * (b @ a) for layer, (a, b) in adapter.layers().items()}
    assert merged.keys() == base.keys() and added.keys() < base.keys()
    for name, value in base.items():
        assert torch.allclose(merged[name], value + added.get(name, 0), rtol=1e-6, atol=1e-8), name
    assert max(value.abs().max() for value in added.values()) > 1e-6  # what is added is seen at these bounds


@pytest.mark.parametrize("form", ["pipeline", "safetensors"])
def test_a_distilled_student(tmp_path, form):
    dmdr_runs.trainer_of(tmp_path, *DRAWN, "training.max_steps=2").train()
    told(exported(tmp_path / "run", tmp_path / "out", form), BIT_FOR_BIT, STOCK, OWN)
    if form == "pipeline":
        few = read_few_steps(tmp_path / "out")
        assert few is not None and few.steps == 2
        card = (tmp_path / "out/README.md").read_text()
        assert "num_inference_steps=2, guidance_scale=0" in card


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Adapters that draw in two steps."""
    folder = tmp_path_factory.mktemp("student")
    keys = [*LORA, "checkpoint.save_lora_only=true"]
    dmdr_runs.trainer_of(folder, *DRAWN, *keys, "dmdr.update_ratio=1", "training.max_steps=1").train()
    return folder / "run"


def test_adapters_of_a_distilled_student_merged_into_its_part(student, tmp_path):
    """From a checkpoint of adapters alone, whose other parts are those of the model that the run began with."""
    lines = exported(student, tmp_path / "out", "safetensors", merge=True)
    told(lines, BIT_FOR_BIT, STOCK, OWN, "merging them moves its pictures by")


def pipe_of_the_card(out: Path, base: Path) -> Any:
    """What the code on the card of an export makes, `base` in place of the model's name."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    assert "glm_training" not in code
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype")  # the word of before, which diffusers warns of
        exec(code.replace("FOLDER", str(out)).replace('"tiny-random"', f'"{base}"'), found)
    return found["pipe"]


@pytest.mark.parametrize("form", ["lora", "safetensors", "pipeline"])
def test_the_code_of_the_card_draws_what_a_student_draws(student, tmp_path, form):
    """Its scheduler is another one than that of the model which adapters or a part are put on."""
    source = Source.read(student)
    base_model(source, torch.float32).save_pretrained(tmp_path / "base")
    exported(student, tmp_path / "out", form, merge=form != "lora", draw=False)
    drawing, family = drawing_of(source), trainers_model(source, "weights", torch.float32)
    drawn = stock_picture(pipe_of_the_card(tmp_path / "out", tmp_path / "base"), family, drawing)
    assert drawn is not None and (drawn - drawing.by(family)[0]).abs().max() <= fresh.STOCK_BOUND


def test_a_student_of_one_step_is_told_its_timestep(student):
    source = Source.read(student)
    dmdr = source.config.dmdr.model_copy(update={"student_steps": 1, "one_step_timestep": 399})
    source = replace(source, config=source.config.model_copy(update={"dmdr": dmdr}))
    use = card._use(Wanted(source, "lora", "weights", False, None))
    assert "Draw in 1 step without guidance: `timesteps=[399], guidance_scale=0`." in use


@pytest.mark.parametrize("form", ["pipeline", "safetensors"])
def test_the_code_of_the_card_loads_one_type(adapters, tmp_path, form):
    """Where none is named, parts from diffusers and from transformers come in two, which do not draw together."""
    base_model(Source.read(adapters), torch.float32).save_pretrained(tmp_path / "base")
    exported(adapters, tmp_path / "out", form, merge=True, dtype=torch.bfloat16, draw=False)
    pipe = pipe_of_the_card(tmp_path / "out", tmp_path / "base")
    parts = (pipe.transformer, pipe.vision_language_encoder, pipe.text_encoder, pipe.vae)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt"}
    assert pipe(["a red circle"], **options).images.isfinite().all()


@pytest.mark.parametrize(("component", "form"), [("autoencoder", "pipeline"), ("generator", "safetensors")])
def test_vgt(tmp_path, component, form):
    vgt_runs.trainer_of(tmp_path, *DRAWN, component=component).train()
    lines = exported(tmp_path / f"run_{component}", tmp_path / "out", form)
    told(lines, BIT_FOR_BIT, OWN, "its pictures differ from those of tiny-random")


def test_edits(tmp_path):
    """The run's own source pictures are edited again; the stock pipeline's call, which fails at edits, is left out."""
    runs.trainer_of(tmp_path, *DRAWN, "model.component=dit", "training.max_steps=1", mode="i2i").train()
    lines = exported(tmp_path / "run", tmp_path / "out", "pipeline")
    told(lines, BIT_FOR_BIT, OWN)
    assert not any(STOCK in line for line in lines)
    assert "pipeline_tag: image-to-image" in (tmp_path / "out/README.md").read_text()


def test_adapters_on_a_model_with_others_merged(adapters, tmp_path):
    """They belong on that one; where those are others by now, nothing is drawn with them."""
    first = shutil.copytree(adapters / "checkpoints/step-000002", tmp_path / "first")
    keys = [*DRAWN, *LORA, f"model.adapters=[{first}]", "training.max_steps=1", "checkpoint.save_lora_only=true"]
    runs.trainer_of(tmp_path, *keys).train()
    told(exported(tmp_path / "run", tmp_path / "out", "lora"), BIT_FOR_BIT, STOCK, OWN)
    assert "belong on it with those" in (tmp_path / "out/README.md").read_text()
    weights = first / "lora_dit/adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    told(exported(tmp_path / "run", tmp_path / "other", "lora"), "the run merged other adapters")


@pytest.mark.parametrize("form", ["lora", "pipeline"])
def test_an_ar_half_that_still_writes_the_same_tokens_is_exported(tmp_path, form):
    keys = [*DRAWN, *LORA, "model.component=ar", "training.max_steps=1", "training.learning_rate=1e-6"]
    runs.trainer_of(tmp_path, *keys).train()
    lines = exported(tmp_path / "run", tmp_path / "out", form, merge=form == "pipeline")
    told(lines, BIT_FOR_BIT, OWN, "are those of tiny-random: its AR half has other weights, and writes the same tokens")


def test_an_ar_half_that_is_that_of_the_base_is_told(adapters):
    source = Source.read(adapters)
    model = source.config.model.model_copy(update={"component": "ar"})
    source = replace(source, config=source.config.model_copy(update={"model": model}))
    drawing, base = drawing_of(source), base_model(source, torch.float32)
    weights, images = weights_digest(base.module("ar")), drawing.by(base)
    with pytest.raises(ExportError, match="the training changed nothing"):
        list(fresh._changed(source, drawing, images, weights))
    told(list(fresh._changed(source, drawing, images, "another digest")), "writes the same tokens")


def test_a_training_that_changed_nothing_is_told():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ExportError, match="draws what owner/base draws, bit for bit: the training changed nothing"):
        fresh.difference(images, images.clone(), "owner/base")
    assert "differ from those of owner/base: by 0.5 of 1 on average" in fresh.difference(
        images, images + 0.5, "owner/base"
    )
