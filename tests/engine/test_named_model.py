"""What `--model` and `--lora` mean: a run's best checkpoint or its last, one by name, adapters with strengths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_training.checkpoint.best import Best
from glm_training.checkpoint.commit import begin_run, save_checkpoint
from glm_training.checkpoint.ledger import LEDGER, Ledger, LedgerEntry
from glm_training.checkpoint.run_record import RECORD, RunRecord
from glm_training.config import resolved_yaml
from glm_training.engine.adapters import adapter_digests
from glm_training.engine.named_model import NamedModel, named_adapters, named_model
from glm_training.models.family import Family
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.lora import add_lora
from glm_training.models.sdxl.family import SDXL
from tests.runs import config_of

BOTH_RANKS = ((4, 8.0), (2, 3.0))
"""Rank and alpha of the adapters: scaled by 2 and by 1.5."""


def pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "GlmImagePipeline"}')


def save(checkpoints: Path, step: int, **options) -> Path:
    options = {"extra_dirs": {"pipeline": pipeline}} | options
    return save_checkpoint(checkpoints, step, {"trainer": {"step": step}}, total_limit=None, **options)


def best(checkpoints: Path, step: int) -> None:
    written = Best(f"step-{step:06d}", step, "eval/total", 0.25, higher_is_better=True).encoded()
    (checkpoints / "best").write_bytes(written)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    checkpoints = tmp_path / "run" / "checkpoints"
    begin_run(checkpoints)
    for step in (1, 2, 3):
        save(checkpoints, step)
    return tmp_path / "run"


def taken(name: Path | str) -> tuple[str, str | None]:
    found = named_model(str(name))
    return Path(found.source).parent.name, found.note


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_of_a_run_its_best_is_taken_and_said_why(run: Path, below: str) -> None:
    best(run / "checkpoints", 2)
    name, note = taken(run / below)
    assert name == "step-000002" and note is not None and "\n" not in note
    assert note.startswith(
        f"--model {run / below} is {run}/checkpoints/step-000002, its best: step 2, eval/total 0.25 ("
    )
    assert "higher is better" in note


def test_without_a_best_the_last_whole_one_is_taken(run: Path) -> None:
    assert taken(run) == ("step-000003", f"--model {run} is {run}/checkpoints/step-000003, its last whole one, as none "
                          "is named its best")  # fmt: skip
    (run / "checkpoints" / "step-000003" / "pipeline" / "model_index.json").write_text("{ }")
    name, note = taken(run)
    assert name == "step-000002" and note is not None and "passed over" in note and "step-000003 is damaged" in note


def test_a_best_that_is_damaged_or_gone_is_passed_over(run: Path) -> None:
    checkpoints = run / "checkpoints"
    best(checkpoints, 2)
    (checkpoints / "step-000002" / "pipeline" / "model_index.json").unlink()
    name, note = taken(run)
    assert name == "step-000003" and note is not None and "step-000002 is damaged" in note
    best(checkpoints, 7)
    name, note = taken(run)
    assert name == "step-000003" and note is not None
    assert note.endswith("its last whole one, as step-000007, which is named its best, is not among its own")


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_run_whose_checkpoints_were_deleted_is_told_so(run: Path, below: str) -> None:
    RunRecord("id", "now", "checkpoints").write(run)
    for step in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(step)
    with pytest.raises(ModelLoadError, match="whose checkpoints are gone: it saved step-000003 in .*checkpoints last"):
        named_model(str(run / below))


def test_a_run_that_died_in_its_first_save_has_saved_none(tmp_path: Path) -> None:
    RunRecord("id", "now", "checkpoints").write(tmp_path)
    (tmp_path / "checkpoints/.partial-step-000001").mkdir(parents=True)
    entries = Ledger((LedgerEntry("step-000001", "0"),), "id")
    (tmp_path / "checkpoints" / LEDGER).write_bytes(entries.encoded())
    with pytest.raises(ModelLoadError, match="has saved no checkpoint yet"):
        named_model(str(tmp_path))


def test_states_that_nobody_draws_with_may_be_damaged(run: Path) -> None:
    (run / "checkpoints" / "step-000003" / "states" / "trainer.json").write_text("")
    assert taken(run)[0] == "step-000003"


def test_a_run_with_nothing_whole_is_refused(run: Path, tmp_path: Path) -> None:
    for step in (run / "checkpoints").glob("step-*"):
        (step / "pipeline" / "model_index.json").write_text("")
    with pytest.raises(ModelLoadError, match=r"no checkpoint in .* is whole(\n.*passed over.*){3}"):
        named_model(str(run))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text(json.dumps({"checkpoints": "checkpoints"}))
    with pytest.raises(ModelLoadError, match="is a run that has saved no checkpoint yet"):
        named_model(str(tmp_path / "begun"))


def test_checkpoints_of_another_run_in_the_folder_are_not_taken(run: Path) -> None:
    checkpoints = run / "checkpoints"
    best(checkpoints, 3)
    begin_run(checkpoints)
    save(checkpoints, 2)
    assert taken(run)[0] == "step-000002"


def test_one_that_is_named_is_taken(run: Path) -> None:
    checkpoints = run / "checkpoints"
    best(checkpoints, 2)
    for name in ("step-000001", "step-000001/pipeline"):
        assert taken(checkpoints / name) == ("step-000001", None)
    assert taken(checkpoints / "latest")[0] == taken(checkpoints / "latest" / "pipeline")[0] == "step-000003"
    assert taken(checkpoints / "best")[0] == taken(checkpoints / "best" / "pipeline")[0] == "step-000002"
    (checkpoints / "best").unlink()
    with pytest.raises(ModelLoadError, match="names no best checkpoint"):
        named_model(str(checkpoints / "best"))
    best(checkpoints, 9)
    with pytest.raises(ModelLoadError, match="best names step-000009, which is not there"):
        named_model(str(checkpoints / "best"))


@pytest.mark.parametrize("name", ["tiny", "tiny-random", "owner/name", "./nowhere"])
def test_what_is_no_folder_is_for_its_loader(name: str) -> None:
    assert named_model(name) == NamedModel(name)


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapters(family: Family, part: str, folder: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Two adapters of different ranks on overlapping layers: folder, and alpha / r B A by layer."""
    found = []
    for number, (rank, alpha) in enumerate(BOTH_RANKS):
        fresh = type(family).load("tiny-random", dtype=torch.float32, seed=3)
        targets = fresh.lora_targets(part)
        add_lora(fresh.module(part), targets[: len(targets) - number], rank, alpha, seed=number)
        generator = torch.Generator().manual_seed(number)
        deltas = {}
        with torch.no_grad():
            for name, module in fresh.module(part).named_modules():
                if hasattr(module, "lora_B"):
                    up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
                    up.copy_(torch.randn(up.shape, generator=generator))
                    deltas[name] = alpha / rank * up.double() @ down.double()
        place = folder / f"{part}-{number}" / f"lora_{part}"
        fresh.save_lora(part, place)
        found.append((place, deltas))
    return found


@pytest.mark.parametrize(("kind", "part"), [(GLMImage, "ar"), (GLMImage, "dit"), (SDXL, "unet")])
def test_strengths_add_up_on_the_weights(tmp_path: Path, kind: type, part: str) -> None:
    name = "sdxl" if kind is SDXL else "glm_image"
    plain = kind.load("tiny-random", dtype=torch.float32)
    (first, one), (second, other) = adapters(plain, part, tmp_path)
    model = NamedModel("tiny-random")
    entries = [f"{first}:0.75", f"{part}={second}:-0.5"]
    found, notes = named_adapters(entries, model, name)
    assert [each.strength for each in found] == [0.75, -0.5] and notes == []
    loaded = model.load(name, dtype=torch.float32, device="cpu", adapters=found)
    before = {key: value.double() for key, value in plain.module(part).named_parameters()}
    after = dict(loaded.module(part).named_parameters())
    assert after.keys() == before.keys() and set(one) > set(other) != set()
    for key, weight in after.items():
        layer = key.removesuffix(".weight")
        expected = before[key]
        if key.endswith(".weight"):
            expected = expected + 0.75 * one.get(layer, 0) - 0.5 * other.get(layer, 0)
        scale = max(1.0, float(expected.abs().max()))
        assert (weight.double() - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * scale, key
    assert sum(not torch.equal(after[f"{layer}.weight"].double(), before[f"{layer}.weight"]) for layer in one) == len(
        one
    )


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """Two deltas that each are lost in bf16 and together are not."""
    plain = GLMImage.load("tiny-random", dtype=torch.bfloat16)
    ((first, deltas), _) = adapters(plain, "dit", tmp_path)
    layer = next(iter(deltas))
    weight = plain.module("dit").get_parameter(f"{layer}.weight")
    row, column = divmod(int(weight.abs().argmax()), weight.shape[1])
    ulp = float(torch.finfo(torch.bfloat16).eps * 2.0 ** weight[row, column].abs().float().log2().floor())
    away = 0.3 * ulp * float(weight[row, column].sign())  # from zero, where the next value is a whole ulp off
    strength = away / float(deltas[layer][row, column])
    found, _ = named_adapters([f"{first}:{strength}"] * 2, NamedModel("tiny-random"), "glm_image")
    once = NamedModel("tiny-random").load("glm_image", dtype=torch.bfloat16, device="cpu", adapters=found[:1])
    both = NamedModel("tiny-random").load("glm_image", dtype=torch.bfloat16, device="cpu", adapters=found)
    name = f"{layer}.weight"
    assert once.module("dit").get_parameter(name)[row, column] == weight[row, column]
    assert both.module("dit").get_parameter(name)[row, column] != weight[row, column]


def test_adapters_of_another_model_name_the_first_layer(tmp_path: Path) -> None:
    ((place, _), _) = adapters(SDXL.load("tiny-random"), "unet", tmp_path)
    with pytest.raises(ModelLoadError) as told:
        named_adapters([f"dit={place}:2", "ar=nowhere"], NamedModel("tiny-random"), "glm_image")
    lines = str(told.value).splitlines()
    assert len(lines) == 2 and "there are no adapters in nowhere" in lines[0]
    first = sorted(load_file(place / "pytorch_lora_weights.safetensors"))[0].removeprefix("unet.")
    assert "does not fit the dit of this model" in lines[1] and "where the model has no such layer" in lines[1]
    assert f"first {first.partition('.lora')[0]}" in lines[1]
    with pytest.raises(ModelLoadError, match="this model has no unet: write ar=FOLDER or dit=FOLDER"):
        named_adapters([f"unet={place}"], NamedModel("tiny-random"), "glm_image")
    with pytest.raises(ModelLoadError, match="say which half it is of: write ar=FOLDER or dit=FOLDER"):
        named_adapters([str(place)], NamedModel("tiny-random"), "glm_image")


def test_a_strength_is_told_from_a_place(tmp_path: Path) -> None:
    ((place, _), _) = adapters(GLMImage.load("tiny-random"), "dit", tmp_path)
    odd = tmp_path / "lora:2"
    place.rename(odd)
    for entry, strength in ((f"dit={odd}", 1.0), (f"dit={odd}:0.5", 0.5), (f"dit={odd}:1e-1", 0.1)):
        ((found,), _) = named_adapters([entry], NamedModel("tiny-random"), "glm_image")
        assert found.folder == odd and found.strength == strength


@pytest.mark.parametrize("part", ["", "dit="])
@pytest.mark.parametrize("strength", ["nan", "inf", "1,5", "-1,5", "", "strong", "0x2", "1.5.2"])
def test_a_strength_that_is_no_number_is_told(tmp_path: Path, strength: str, part: str) -> None:
    ((place, _), _) = adapters(GLMImage.load("tiny-random"), "dit", tmp_path)
    with pytest.raises(ModelLoadError) as told:
        named_adapters([f"{part}{place}:{strength}"], NamedModel("tiny-random"), "glm_image")
    shown = f"the strength {strength!r} is no finite number: write it as {part}{place}:0.5"
    assert str(told.value) == f"--lora {part}{place}:{strength}: {shown}"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("nowhere:x", "there are no adapters in nowhere:x"),
        ("nowhere:", "there are no adapters in nowhere:"),
        ("nowhere:1,5", "the strength '1,5' is no finite number"),
        ("nowhere:-inf", "the strength '-inf' is no finite number"),
    ],
)
def test_of_a_place_that_is_not_there_a_number_alone_is_a_strength(entry: str, why: str) -> None:
    with pytest.raises(ModelLoadError, match=why):
        named_adapters([f"dit={entry}"], NamedModel("tiny-random"), "glm_image")


def test_a_run_of_adapters_alone_is_its_model_with_them(tmp_path: Path) -> None:
    fresh = GLMImage.load("tiny-random", dtype=torch.float32)
    ((first, deltas), (second, others)) = adapters(fresh, "dit", tmp_path)
    keys = [f"model.adapters=[{second}]", "model.component=dit", "lora.enabled=true"]
    config = config_of(tmp_path, *keys)

    def fill(folder: Path) -> None:
        for path in first.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    checkpoints = tmp_path / "run" / "checkpoints"
    begin_run(checkpoints)
    context = {"config": resolved_yaml(config), "data": adapter_digests(config)}
    save(checkpoints, 4, extra_dirs={"lora_dit": fill}, metadata=context)
    found = named_model(str(tmp_path / "run"))
    assert found.source == "tiny-random" and found.family == "glm_image" and found.note is not None
    assert found.note.endswith("it has adapters alone, which go on tiny-random")
    loaded = found.load("glm_image", dtype=torch.float32, device="cpu")
    for layer, delta in deltas.items():
        name = f"{layer}.weight"
        expected = fresh.module("dit").get_parameter(name).double() + delta + others.get(layer, 0)
        scale = max(1.0, float(expected.abs().max()))
        difference = (loaded.module("dit").get_parameter(name).double() - expected).abs().max()
        assert difference <= 32 * torch.finfo(torch.float32).eps * scale
    rounded = {**context, "config": resolved_yaml(config_of(tmp_path, *keys, "model.quantization=nf4"))}
    save(checkpoints, 5, extra_dirs={"lora_dit": fill}, metadata=rounded)
    assert str(named_model(str(checkpoints / "step-000005")).note).endswith(
        "step-000005 has adapters alone, which go on tiny-random in full; they were trained over it in nf4, with which "
        "the run drew"
    )
    next(second.glob("*.safetensors")).write_bytes((first / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelLoadError, match="another adapter by now"):
        named_model(str(tmp_path / "run"))


def test_a_misspelt_run_is_no_hub_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    (run / RECORD).write_text("{}")
    name = f"{run.parent.name}/{run.name}"
    with pytest.raises(
        ModelLoadError, match=rf"--model {name}x: among the runs .* of that name; did you mean {name}\?"
    ):
        named_model(f"{name}x")
    assert named_model("owner/name") == NamedModel("owner/name")
    (Path("owner") / "another").mkdir(parents=True)
    assert named_model("owner/name") == NamedModel("owner/name"), "a folder without runs says nothing of the hub"
