"""An export has its name once all of it is right, and nothing is lost or left half."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glm_training.checkpoint import disk
from glm_training.checkpoint.best import Best
from glm_training.checkpoint.manifest import MANIFEST, Manifest, digest_file, read_manifest
from glm_training.checkpoint.run_record import RunRecord
from glm_training.checkpoint.shards import write_shards
from glm_training.export import run as export_run
from glm_training.export.drawing import drawing_of, own_pictures
from glm_training.export.formats import Wanted, write
from glm_training.export.models import trainers_model
from glm_training.export.source import ExportError, Source
from glm_training.utils.folder_lock import LOCK, Holder
from glm_training.utils.prompt_lines import write_prompts
from tests.export.exporting import exported

ROOT = Path(__file__).parents[2]


def written(source: Path, out: Path, *, ema: bool | None = None) -> dict[str, torch.Tensor]:
    """The DiT's weights as an export of `safetensors` has them, which nothing has verified."""
    found = Source.read(source)
    out.mkdir()
    write(Wanted(found, "safetensors", found.chosen(ema), False, None), out, None)
    return load_file(out / "transformer/diffusion_pytorch_model.safetensors")


def test_a_run_means_its_best_or_its_newest(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    assert Source.read(copy).folder.name == "step-000002" and "its best" in str(Source.read(copy).note)
    (copy / "checkpoints/best").write_bytes(Best("step-000001", 1, "eval/total", 0.5, True).encoded())
    for name in (copy, copy / "checkpoints", copy / "checkpoints/best", copy / "checkpoints/step-000001/pipeline"):
        assert Source.read(name).folder == copy / "checkpoints/step-000001", name
    assert Source.read(copy / "checkpoints/latest").folder.name == "step-000002"
    for name, why in (
        (tmp_path, "no checkpoint in"),
        (tmp_path / "nowhere", "there is no .*nowhere$"),
        (tmp_path / "ru", "no .*ru; did you mean .*/run\\?"),
    ):
        with pytest.raises(ExportError, match=why):
            Source.read(name)


def test_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported(run, Path("out"), "pipeline", draw=False, licence="mit")
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["library_name"] == "diffusers" and "base_model" not in front
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = ([line for line in metrics if line["step"] == step and "eval/total" in line][0] for step in (0, 2))
    assert f"| total | {before['eval/total']:.3f} | {after['eval/total']:.3f} |" in card
    for part in ("GlmImagePipeline.from_pretrained", "| structure | 1 |", "step-000002", "slow average (EMA)"):
        assert part in card, part
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit.returncode != 0 or f"commit `{commit.stdout.strip()}`" in card  # a copy of the tree is no repository
    assert str(tmp_path) not in card and "/root" not in card and "pytest" not in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["training"]["ema"]["decay"] == 0.5 and "logging" not in settings


def test_a_log_that_is_torn_gives_its_figures(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "eval/to')
    with (copy / "metrics.jsonl").open("r+") as log:
        rest = log.read()
        log.seek(0)
        log.write("[3]\n\n" + rest)
    exported(copy, tmp_path / "out", "safetensors", draw=False)
    assert "| total |" in (tmp_path / "out/README.md").read_text()


def test_prompts_of_several_lines_are_drawn_as_they_are(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    samples = copy / "samples" / "step-000002"
    write_prompts(samples, ["a cat\non a mat", "a\u2028dog"])
    drawing = drawing_of(Source.read(copy))
    assert drawing.prompts == ["a cat\non a mat", "a\u2028dog"] and drawing.rows == [0, 1] and drawing.of_the_run


@pytest.mark.parametrize("damage", ["torn", "gone", "older list"])
def test_samples_that_are_not_all_here_stop_no_export(run, tmp_path, damage):
    copy = shutil.copytree(run, tmp_path / "run")
    samples = copy / "samples" / "step-000002"
    if damage == "older list":
        (samples / "prompts.txt").write_text("a cat\non a mat\na dog\n")
    elif damage == "torn":
        (samples / "1.png").write_bytes((samples / "1.png").read_bytes()[:90])
    else:
        (samples / "0.png").unlink()
    source = Source.read(copy)
    drawing = drawing_of(source)
    assert not drawing.of_the_run and len(drawing.prompts) == 2
    assert own_pictures(source, drawing, source.chosen(None)) is None


def test_the_licence_and_name_of_the_base_are_those_of_its_card(run, tmp_path):
    """Of a model of the hub the card says its id; a licence is taken from the base's own card, or not named."""
    base = shutil.copytree(Source.read(run).folder / "pipeline", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: openrail++\n---\nA base.\n")
    exported(run, tmp_path / "out", "pipeline", draw=False, base=str(base))
    assert "license: openrail++" in (tmp_path / "out/README.md").read_text().split("---\n")[1]
    exported(run, tmp_path / "hub", "pipeline", draw=False, base="someone/base")
    front = yaml.safe_load((tmp_path / "hub/README.md").read_text().split("---\n")[1])
    assert (
        front["base_model"] == "someone/base" and front["base_model_relation"] == "finetune" and "license" not in front
    )


def test_what_stands_there_is_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there already"):
        exported(run, out, "pipeline", draw=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    exported(run, out, "pipeline", draw=False, overwrite=True)
    assert (tmp_path / "out.old-1/mine.txt").read_text() == "mine" and (out / "model_index.json").is_file()


@pytest.mark.parametrize("place", [".", "..", "run/..", "run", "run/checkpoints/step-000002", "link"])
def test_an_export_takes_no_place_of_its_own_checkpoint(run, tmp_path, monkeypatch, place):
    copy = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "link").symlink_to("run/checkpoints")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="--out"):
        exported(copy, Path(place), "pipeline", draw=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"] and Source.read(copy).folder.is_dir()


IN_A_RUN = {
    "in a checkpoint": "run/checkpoints/step-000001/extra",
    "deep in a checkpoint": "run/checkpoints/step-000001/pipeline/x/y",
    "called like a step": "run/checkpoints/step-000009",
    "like one under way": "run/checkpoints/.partial-step-000009",
    "among the checkpoints": "run/checkpoints/x",
    "by a link": "link/x",
    "of another run": "other/checkpoints/x",
    "of a run that saved none": "fresh/saved/x",
    "that folder itself": "fresh/saved",
    "of a run without a ledger": "old/checkpoints/x",
    "a step beside moved checkpoints": "moved/step-000009",
    "in a moved checkpoint": "moved/step-000001/x",
    "a step of its adapters": "fresh/step-000009/x",
    "another run": "other",
    "the checkpoints of another": "other/checkpoints",
    "a checkpoint of another": "other/checkpoints/step-000001",
}


@pytest.mark.parametrize("place", IN_A_RUN.values(), ids=IN_A_RUN)
def test_an_export_goes_into_no_folder_that_a_run_keeps(run, tmp_path, monkeypatch, place):
    """It would be deleted with its checkpoint, pruned, or taken for one."""
    light = shutil.ignore_patterns("pipeline", "states", "samples")
    for name in ("run", "other"):
        shutil.copytree(run, tmp_path / name, ignore=light)
    shutil.copytree(run / "checkpoints", tmp_path / "old/checkpoints", ignore=light)
    (tmp_path / "old/checkpoints/ledger.json").unlink()
    shutil.copytree(run / "checkpoints/step-000001", tmp_path / "moved/step-000001", ignore=light)
    (tmp_path / "fresh").mkdir()
    RunRecord("id", "now", "saved").write(tmp_path / "fresh")
    (tmp_path / "link").symlink_to("run/checkpoints")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=r"--out .*Name a folder outside of it, as exports/x"):
        exported(run, Path(place), "safetensors", draw=False, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["run/exports/x", "exports/step-000009", "moved/x", "checkpoints/x"])
def test_other_places_are_taken(run, tmp_path, monkeypatch, place):
    """Beside a run's checkpoints, a checkpoint that was moved, or one export called as its step beside another."""
    light = shutil.ignore_patterns("pipeline", "states", "samples")
    shutil.copytree(run, tmp_path / "run", ignore=light)
    shutil.copytree(run / "checkpoints/step-000001", tmp_path / "moved/step-000001", ignore=light)
    (tmp_path / "exports/step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    source = Source.read(run)
    export_run.check(Wanted(source, "safetensors", source.chosen(None), False, None), export_run.Target(Path(place)))


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = shutil.copytree(Source.read(run).folder, tmp_path / "step-000002")
    file = copy / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ExportError, match=f"{re.escape(str(copy))}.*another SHA-256"):
        exported(copy, tmp_path / "out", "pipeline", draw=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002"]


@pytest.mark.parametrize("fault", ["full before", "full in between", "killed"])
def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, fault):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt if fault == "killed" else OSError(errno.ENOSPC, "No space left on device")

    if fault == "full before":
        monkeypatch.setattr(disk, "free_bytes", lambda _: 1000)
    else:
        monkeypatch.setattr(export_run, "write_card", fail)
    with pytest.raises(KeyboardInterrupt if fault == "killed" else ExportError) as found:
        exported(run, tmp_path / "out", "pipeline", draw=False)
    assert fault == "killed" or "Free some space" in str(found.value)
    assert ("TMPDIR" in str(found.value)) == (fault == "full in between")  # where --out has room by then
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_exports_to_one_name_the_second_loses_nothing(run, tmp_path, monkeypatch, overwrite):
    """It begins while the first writes its card."""
    write_card, told = export_run.write_card, list[str]()

    def meanwhile(folder: Path, *rest: Any) -> None:
        monkeypatch.setattr(export_run, "write_card", write_card)
        with pytest.raises(ExportError) as second:
            exported(run, tmp_path / "out", "safetensors", draw=False, overwrite=overwrite)
        told.append(str(second.value))
        write_card(folder, *rest)

    monkeypatch.setattr(export_run, "write_card", meanwhile)
    exported(run, tmp_path / "out", "pipeline", draw=False, overwrite=overwrite)
    assert f"another export to {tmp_path / 'out'} is under way" in told[0] and f"pid {os.getpid()}" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/model_index.json").is_file()


@pytest.mark.parametrize("late", [False, True])
def test_a_name_that_was_taken_meanwhile_is_left_to_its_owner(run, tmp_path, monkeypatch, late):
    """By any program, while the export is written or between the last look and the renaming."""

    def take(*_: object) -> bool:
        monkeypatch.setattr(os.path, "lexists", lexists)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
        return False

    lexists, sync = os.path.lexists, export_run._sync

    def then_take(folder: Path) -> None:
        sync(folder)
        monkeypatch.setattr(os.path, "lexists", take) if late else take()

    monkeypatch.setattr(export_run, "_sync", then_take)
    with pytest.raises(ExportError, match="out is there by now: nothing was exported"):
        exported(run, tmp_path / "out", "safetensors", draw=False)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/mine.txt"]


def test_what_a_killed_export_left_is_in_nobodys_way(run, tmp_path):
    left = tmp_path / ".partial-out/export"
    left.mkdir(parents=True)
    (left / "old.safetensors").write_bytes(b"x")
    dead = replace(Holder.here(), started=1)
    (left.parent / LOCK).write_bytes(dead.encoded())
    exported(run, tmp_path / "out", "safetensors", draw=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out/old.safetensors").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "another"])
def test_what_does_not_read_or_draw_as_it_should_gets_no_name(run, tmp_path, monkeypatch, damage):
    """Damage between writing and verifying: a disk, or a fault of ours."""

    def damaged(folder: Path) -> None:
        file = folder / "transformer/diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        if damage == "missing":
            del weights[name]
        elif damage == "nan":
            weights[name].view(-1)[0] = torch.nan
        else:
            weights = {key: value * 1.01 for key, value in weights.items()}
        save_file(weights, file)

    monkeypatch.setattr(export_run, "scrub_files", damaged)
    why = {
        "nan": "is not finite in torch.float32",
        "missing": "missing keys",
        "another": "does not draw what the weights",
    }[damage]
    with pytest.raises(ExportError, match=why):
        exported(run, tmp_path / "out", "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_states_in_shards(run, tmp_path):
    """As a run in shards leaves them: the average in two files of pieces, the pipeline whole."""
    copy = shutil.copytree(Source.read(run).folder, tmp_path / "step-000002")
    states, manifest = copy / "states", read_manifest(copy)
    whole, files = {}, dict(manifest.files)
    for kind in ("dit_weights", "dit_ema"):
        whole[kind] = load_file(states / f"{kind}.safetensors")
        (states / f"{kind}.safetensors").unlink()
        del files[f"states/{kind}.safetensors"]
        (states / kind).mkdir()
        for name, record in write_shards(states / kind, whole[kind]).items():
            files[f"states/{kind}/{name}"] = record
    (copy / MANIFEST).write_bytes(Manifest(manifest.step, manifest.states, manifest.metadata, files).encoded())
    found = written(copy, tmp_path / "weights", ema=False)
    assert found.keys() == whole["dit_weights"].keys()
    assert all(torch.equal(found[name], value) for name, value in whole["dit_weights"].items())
    average = trainers_model(Source.read(copy), "average", torch.float32).trainable("dit")
    assert all(torch.equal(average[name], value) for name, value in whole["dit_ema"].items())
    assert any(not torch.equal(whole["dit_weights"][name], value) for name, value in whole["dit_ema"].items())
    shard = next(path for path in (copy / "states/dit_ema").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ExportError, match="states/dit_ema"):
        trainers_model(Source.read(copy), "average", torch.float32)


@pytest.mark.parametrize(
    ("form", "merge", "ema", "why"),
    [
        ("lora", False, None, "trained the whole dit and no adapters"),
        ("pipeline", False, True, "has no average of its weights"),
    ],
)
def test_what_cannot_be_exported_so(tmp_path_factory, run, form, merge, ema, why, monkeypatch):
    source = Source.read(run)
    if ema:
        monkeypatch.setattr(Source, "_averaged", False)
    with pytest.raises(ExportError, match=why):
        Wanted(source, form, source.chosen(ema), merge, None).check()


def test_a_large_model_is_read_again_and_not_drawn(run, tmp_path, monkeypatch):
    from glm_training.export import verify

    monkeypatch.setattr(verify, "LARGEST_DRAWN", 1000)
    lines = exported(run, tmp_path / "out", "pipeline")
    assert any("no picture was drawn" in line for line in lines) and any("loaded again" in line for line in lines)


def test_digests_of_what_is_copied(run, tmp_path):
    exported(run, tmp_path / "out", "pipeline", draw=False)
    folder = Source.read(run).folder
    for name, record in read_manifest(folder).files.items():
        if name.startswith("pipeline/") and name.endswith(".safetensors"):
            assert digest_file(tmp_path / "out" / name.removeprefix("pipeline/")) == record
