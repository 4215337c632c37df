"""Preference runs end to end: where they start, what they change, what they leave behind, what they refuse."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from glm_training.cli.main import main
from glm_training.engine.errors import TrainingError
from glm_training.engine.parts import as_shown
from glm_training.engine.validation import RowFigures
from glm_training.models.sdxl.tiny import build_tiny
from glm_training.trainers import dpo_trainer
from glm_training.utils.distributed import World
from glm_training.utils.signals import StopRequested
from tests.preference_runs import config_of, stepped, trainer_of, write_pairs
from tests.runs import weights_of

LN2 = math.log(2)
Refused = Callable[..., str]
PARTS = {"sdxl": ["unet"], "glm_image": ["ar", "dit"]}


def figures(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, float]]:
    return [line for line in figures(run) if "time/step_seconds" in line]


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("lora", ["true", "false"])
def test_a_run_starts_at_ln_2_and_trains_its_parts(tmp_path, family, lora) -> None:
    trainer = trainer_of(tmp_path, family, f"lora.enabled={lora}", "checkpoint.save_lora_only=false")
    before = weights_of(trainer)
    frozen = {name: p.clone() for name, p in trainer.family.component(PARTS[family][0]).named_parameters()}
    assert trainer.train().step == 2
    first, second = steps_of(tmp_path / "run")
    for part in PARTS[family]:
        assert abs(first[f"{part}/loss"] - LN2) <= 1e-6 and first[f"{part}/margin"] == 0
        assert abs(second[f"{part}/loss"] - LN2) > 1e-6
        moved = [not value.equal(before[part][name]) for name, value in trainer.parts[part].parameters.items()]
        assert sum(moved) > len(moved) / 3
    trained = {id(param) for part in trainer.parts.values() for param in part.parameters.values()}
    for name, param in trainer.family.component(PARTS[family][0]).named_parameters():
        assert id(param) in trained or torch.equal(param, frozen[name]), f"{name} is no part of it"


@pytest.mark.parametrize("lora", ["true", "false"])
def test_under_bf16_autocast_it_starts_at_ln_2_and_trains(tmp_path, lora) -> None:
    bf16 = ["training.mixed_precision=bf16", f"lora.enabled={lora}", "checkpoint.save_lora_only=false"]
    trainer = trainer_of(tmp_path, "sdxl", *bf16)
    before = weights_of(trainer)["unet"]
    seen: list[torch.dtype] = []
    trainer.family.unet.unet.conv_in.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    trainer.train()
    first, second = steps_of(tmp_path / "run")
    assert set(seen) == {torch.bfloat16}
    assert abs(first["unet/loss"] - LN2) <= 1e-6 and first["unet/margin"] == 0
    assert math.isfinite(second["unet/loss"]) and abs(second["unet/loss"] - LN2) > 1e-6
    parameters = trainer.parts["unet"].parameters
    assert all(value.dtype == torch.float32 for value in parameters.values())
    assert sum(not value.equal(before[name]) for name, value in parameters.items()) > len(parameters) / 3


@pytest.mark.parametrize(("lora", "rate", "steps"), [("true", 2e-3, 100), ("false", 2e-4, 40)])
def test_a_toy_preference_is_learnt(tmp_path, lora, rate, steps) -> None:
    """At rates where a run hangs on its seed alone, not on how the processor rounds."""
    pairs = write_pairs(tmp_path / "bright", bright=True)
    toy = [f"data.pairs={pairs}", f"evaluation.eval_pairs={pairs}", f"lora.enabled={lora}"]
    adamw = ["training.optimizer=adamw", f"training.learning_rate={rate}", "training.adam_beta1=0.9"]
    rest = ["training.batch_size=8", "checkpoint.save_lora_only=false"]
    held_out = stepped(tmp_path, "sdxl", *toy, *adamw, *rest, steps=steps).validate()
    assert held_out["unet/accuracy"] == 1 and held_out["unet/loss"] < LN2 / 1.3


def test_the_reference_of_full_training_is_the_frozen_start(tmp_path) -> None:
    trainer = stepped(tmp_path, "sdxl", "lora.enabled=false", "checkpoint.save_lora_only=false")
    start = trainer_of(tmp_path, "sdxl", "lora.enabled=false", "checkpoint.save_lora_only=false").family.unet
    encoded = trainer.encoder.encode(trainer.dataset.batch([0]))
    given = (encoded.clean, torch.tensor([500, 500]), encoded.condition.text, encoded.condition.time_ids)
    with torch.no_grad():
        trained, frozen = trainer.family.unet(*given), start(*given)
        with trainer.parts["unet"].as_reference():
            reference = trainer.family.unet(*given)
    assert torch.equal(reference, frozen) and not torch.equal(trained, frozen)


def test_the_average_of_the_weights_is_judged_against_the_frozen_start(tmp_path) -> None:
    keys = ["lora.enabled=false", "checkpoint.save_lora_only=false", "training.ema.decay=0.5"]
    trainer = stepped(tmp_path, "sdxl", *keys)
    part = trainer.parts["unet"]
    with as_shown(trainer.parts, "evaluation"):
        shown = trainer.judge()
    own = trainer.judge()
    with torch.no_grad():
        for name, value in part.ema.snapshot.state_dict().items():
            part.parameters[name].copy_(value)
    for name, values in trainer.judge().items():
        assert torch.equal(shown[name], values)
    assert not torch.equal(shown["unet/loss"], own["unet/loss"])


def test_prompts_change_what_is_learnt(tmp_path) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    before = weights_of(stepped(tmp_path, "sdxl"))["unet"]
    listing = pairs / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("a red circle", "a blue square of the cat"))
    after = weights_of(stepped(tmp_path, "sdxl"))["unet"]
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-6


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_come_at_step_0_and_every_n_and_disturb_nothing(tmp_path) -> None:
    plain = trainer_of(tmp_path, "sdxl", f"output_dir={tmp_path}/plain", "training.max_steps=3")
    plain.train()
    drawing = ["logging.log_images=true", "logging.sample_interval=2", "logging.num_log_images=2"]
    trainer = trainer_of(tmp_path, "sdxl", f"output_dir={tmp_path}/drawn", "training.max_steps=3", *drawing)
    trainer.train()
    folders = sorted((tmp_path / "drawn/samples").glob("step-*"))
    assert [folder.name for folder in folders] == ["step-000000", "step-000002", "step-000003"]
    for folder in folders:
        assert (folder / "prompts.txt").read_text().splitlines() == ["a red circle", "a cat"]
        assert (folder / "1.png").is_file()
    assert (folders[0] / "0.png").read_bytes() != (folders[2] / "0.png").read_bytes()
    for name, value in weights_of(plain)["unet"].items():
        assert torch.equal(value, trainer.parts["unet"].parameters[name]), name


def test_samples_of_the_same_weights_are_the_same(tmp_path) -> None:
    for name in ("a", "b"):
        drawing = ["logging.log_images=true", "training.max_steps=1", f"output_dir={tmp_path}/{name}"]
        trainer_of(tmp_path, "sdxl", *drawing).train()
    drawn = [(tmp_path / name / "samples/step-000001/0.png").read_bytes() for name in ("a", "b")]
    assert drawn[0] == drawn[1]


# -- the adapter -------------------------------------------------------------------------------------------------------


def test_the_exported_adapter_draws_the_same_in_a_fresh_stock_pipeline(tmp_path) -> None:
    trainer = trainer_of(tmp_path, "sdxl", "checkpoint.save_lora=true", "training.learning_rate=1")
    trainer.train()
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}

    def drawn(pipeline: StableDiffusionXLPipeline):
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images)

    trainer.family.eval()
    ours, base = drawn(trainer.family.to_pipeline()), drawn(build_tiny(seed=3))
    for folder in (tmp_path / "run/lora/step-000002/unet", tmp_path / "run/checkpoints/step-000002/lora_unet"):
        assert [path.name for path in folder.iterdir()] == ["pytorch_lora_weights.safetensors"], "nothing but adapters"
        stock = build_tiny(seed=3)
        stock.load_lora_weights(str(folder))
        assert torch.equal(drawn(stock), ours)
    assert (ours - base).abs().max() > 1e-3


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PARTS)
def test_sft_learns_the_preferred_images_without_a_reference(tmp_path, family) -> None:
    trainer = trainer_of(tmp_path, family, "dpo.loss=sft", f"evaluation.eval_pairs={tmp_path}/pairs")
    assert all(part.reference is None for part in trainer.parts.values())
    trainer.train()
    logged = figures(tmp_path / "run")
    evaluated = [row for row in logged if f"eval/{PARTS[family][-1]}/loss" in row]
    assert len(evaluated) == 2
    for part in PARTS[family]:
        assert evaluated[1][f"eval/{part}/loss"] < evaluated[0][f"eval/{part}/loss"]
        assert f"eval/{part}/accuracy" not in evaluated[0]
    entries = len(list((tmp_path / "cache").rglob("*.safetensors")))
    assert entries == 4 + (4 if family == "sdxl" else 2), "preferred images, prompts and quoted words alone are encoded"


def test_turbo_noises_at_four_levels_only(tmp_path) -> None:
    trainer = trainer_of(tmp_path, "sdxl", "dpo.timesteps=turbo")
    assert trainer._levels(torch.tensor([0.0, 0.3, 0.6, 0.99]), (64, 64)).timestep.tolist() == [999, 749, 499, 249]
    uniform = trainer_of(tmp_path, "sdxl")
    assert uniform._levels(torch.tensor([0.0, 0.3, 0.6, 0.9995]), (64, 64)).timestep.tolist() == [0, 300, 600, 999]


def test_min_snr_and_dropout_change_what_is_learnt(tmp_path) -> None:
    plain = weights_of(stepped(tmp_path, "sdxl"))["unet"]
    for option in ("dpo.min_snr_gamma=0.5", "dpo.prompt_dropout=0.9", "dpo.timesteps=turbo"):
        other = weights_of(stepped(tmp_path, "sdxl", option))["unet"]
        assert any(not torch.equal(plain[name], other[name]) for name in plain), option


def test_held_out_pairs_are_judged_alike_every_time(tmp_path) -> None:
    trainer = stepped(tmp_path, "glm_image", f"evaluation.eval_pairs={tmp_path}/pairs", steps=1)
    first = trainer.validate()
    assert trainer.validate() == first
    assert {f"{part}/{name}" for part in ("ar", "dit") for name in ("loss", "accuracy", "margin")} <= first.keys()
    one_by_one = trainer_of(tmp_path, "glm_image", f"evaluation.eval_pairs={tmp_path}/pairs", "training.batch_size=1")
    one_by_one.prepare()
    one_by_one.load({**trainer.state()})
    for name, value in one_by_one.validate().items():
        assert value == pytest.approx(first[name], abs=2e-3), name


def test_ties_are_counted_for_the_user(tmp_path, capsys) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    tie = {"caption": "a tie", "jpg_0": "images/0_preferred.png", "jpg_1": "images/1_preferred.png", "label_0": 0.5}
    with (pairs / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(tie) + "\n")
    trainer_of(tmp_path, "sdxl", "training.max_steps=1").train()
    assert "1 of 5 pairs in" in capsys.readouterr().out


# -- stopping ----------------------------------------------------------------------------------------------------------

AR = ["model.component=ar", "training.batch_size=1"]


def test_a_stop_while_the_reference_is_asked_keeps_its_answers(tmp_path, monkeypatch, capsys) -> None:
    trainer = trainer_of(tmp_path, "glm_image", *AR)
    trainer.encoder.fill([trainer.dataset], trainer.console, lambda: None)
    polls: list[int] = []

    def stop() -> None:
        polls.append(1)
        if len(polls) == 2:
            raise StopRequested

    monkeypatch.setattr(trainer.signals, "check", stop)
    with pytest.raises(StopRequested):
        trainer.prepare()
    assert trainer.references.state()["log_probs"].shape == (2, 2), "of four pairs"
    again = trainer_of(tmp_path, "glm_image", *AR)
    again.load_extra_state(trainer.extra_state())
    asked: list[int] = []
    score = dpo_trainer.sequence_log_probs
    monkeypatch.setattr(
        dpo_trainer, "sequence_log_probs", lambda *given: (asked.append(len(given[2])), score(*given))[1]
    )
    capsys.readouterr()
    again.prepare()
    assert sum(asked) == 2 * 2, "both images of the two pairs that were left"
    assert "compared 2 in " in capsys.readouterr().out


@pytest.mark.parametrize("pairs", [1, 3, 4])
def test_every_process_makes_as_many_passes_and_polls_as_often(tmp_path, monkeypatch, pairs) -> None:
    """Two processes played by one: networks in shards, and stops, need them in step."""
    data = write_pairs(tmp_path / "pairs")
    listing = data / "metadata.jsonl"
    listing.write_text("\n".join(listing.read_text().splitlines()[:pairs]) + "\n")
    counts, kept, weighed = [], {}, 0
    for rank in (0, 1):
        trainer = trainer_of(tmp_path, "glm_image", *AR, f"evaluation.eval_pairs={data}")
        trainer.encoder.fill([trainer.dataset, trainer.dataset.held_out], trainer.console, lambda: None)
        passes: list[str] = []
        trainer.family.ar.register_forward_hook(lambda *_, seen=passes: seen.append("pass"))
        monkeypatch.setattr(trainer.signals, "check", lambda seen=passes: seen.append("poll"))
        trainer.world = World(rank, 2)
        trainer._fill_references(trainer.dataset)
        kept |= trainer.references._values
        trainer.references._values = {digest: (0.0, 0.0) for digest in trainer.dataset.example_digests().values()}
        monkeypatch.setattr(
            RowFigures, "gathered", lambda found, world: {"rows": sum(len(n) for n, _ in found._given["ar/loss"])}
        )
        weighed += trainer.judge()["rows"]
        counts.append(passes)
    # one poll per pass, and one after the last pass of the judging: there a process that failed in it is heard
    drawn = 2 * math.ceil(pairs / 2)
    assert counts[0] == counts[1] and (counts[0].count("pass"), counts[0].count("poll")) == (drawn, drawn + 1)
    assert len(kept) == pairs and weighed == pairs, f"{weighed}: a repeat does not count"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch) -> Refused:
    """What a run of the command line says on standard error before it has written anything."""

    def run(*overrides: str) -> str:
        config_of(tmp_path, "sdxl")  # writes the file
        arguments = ["glm-train", "train", "--config", str(tmp_path / "sdxl.yaml"), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code not in (0, None)
        assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists(), "something was half-written"
        return capsys.readouterr().err

    return run


def test_broken_pairs_are_told_before_anything_is_written(tmp_path, refused) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    (pairs / "images/1_rejected.png").unlink()
    (pairs / "images/2_preferred.png").write_bytes(b"no image")
    told = refused()
    assert "metadata.jsonl:2" in told and "1_rejected.png does not exist" in told
    assert "metadata.jsonl:3" in told and "2_preferred.png" in told
    (pairs / "metadata.jsonl").write_text('{"prompt": "x", \n')
    assert "not JSON" in refused()
    assert "does not exist" in refused(f"data.pairs={tmp_path}/nowhere")


def test_broken_held_out_pairs_too(tmp_path, refused) -> None:
    (tmp_path / "held_out").mkdir()
    told = refused(f"evaluation.eval_pairs={tmp_path}/held_out")
    assert "holds neither metadata.jsonl nor human_feedback.json" in told


def test_ids_that_cannot_be_reached_are_explained(refused) -> None:
    told = refused("data.pairs=yuvalkirstain/pickapic_v2")
    assert "save_to_disk('data/pickapic_v2')" in told
    overrides = ["model.name=some-owner/some-sdxl", "model.local_files_only=true"]
    assert "hf download some-owner/some-sdxl" in refused(*overrides)


def test_new_pairs_have_no_reference_once_the_start_is_gone(tmp_path) -> None:
    half = ["model.component=ar", f"output_dir={tmp_path}/first"]
    trainer_of(tmp_path, "glm_image", *half).train()
    listing = tmp_path / "pairs/metadata.jsonl"
    listing.write_text(listing.read_text().replace("a cat", "a dog"))
    resumed = ["model.component=ar", f"checkpoint.resume_from={tmp_path}/first/checkpoints/step-000002"]
    trainer = trainer_of(tmp_path, "glm_image", *resumed, "resume.accept=[data]", "training.max_steps=3")
    with pytest.raises(TrainingError, match="1 new pair since the start of the run.*lora.ar.enabled"):
        trainer.train()
