"""Trained halves in shards: which update rules work there, and checkpoints that any number of processes goes on from.

That two processes with shards come to the weights of one is among the other equivalences, beside DDP.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm_training.checkpoint.manifest import read_manifest
from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from glm_training.checkpoint.shards import saved_tensors
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.engine.sharding import SHARDABLE
from glm_training.export.models import trainers_model, whole_model
from glm_training.export.source import Source
from tests.parity.launching import run_two_processes
from tests.parity.sharded_worker import ADAM, KINDS, RULES
from tests.runs import trainer_of
from tests.same import flat

BATCH = "training.batch_size=4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One process alone for four steps, and what two do in shards."""
    folder = tmp_path_factory.mktemp("shards")
    trainer_of(folder, BATCH, *ADAM, f"output_dir={folder}/alone").train()
    run_two_processes("sharded_worker.py", str(folder))
    return folder


def tensors(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    """Every tensor of the trained states of a checkpoint, whole, by place."""
    states = load_checkpoint(folder / name / "checkpoints" / f"step-{step:06d}")
    return {
        path: value for state in states if state[:3] in ("ar_", "dit") for path, value in flat(states[state], state)
    }


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left if left[name].numel())


@pytest.mark.parametrize("rule", RULES)
def test_update_rules_that_take_shards_are_those_that_are_let_through(runs, rule):
    for rank in (0, 1):
        told = torch.load(runs / f"rules-{rank}.pt", weights_only=True)[rule]
        if rule in SHARDABLE:
            off, moved = told
            assert moved > 0.05
            # Muon's matrices are made orthogonal in bf16, whose sums depend on their order
            assert off <= (2**-5 * moved if rule == "muon" else 1e-6)
        else:
            assert isinstance(told, str)


def test_four_steps_equal_two_and_a_resume_bit_for_bit(runs):
    whole, again = tensors(runs, "shards", 4), tensors(runs, "again", 4)
    assert furthest(whole, tensors(runs, "shards", 2)) > 1e-4
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_goes_from_one_process_to_shards_and_back(runs):
    alone = tensors(runs, "alone", 4)
    moved = furthest(alone, tensors(runs, "alone", 2))
    resume = f"checkpoint.resume_from={runs}/shards/checkpoints/step-000002"
    accepted = "resume.accept=[training.batch_size]"
    trainer_of(runs, BATCH, *ADAM, resume, accepted, f"output_dir={runs}/from-shards").train()
    for name in ("shards", "from-alone", "from-shards"):
        assert furthest(alone, tensors(runs, name, 4)) <= 0.01 * moved, name


def test_an_export_puts_shards_together_on_one_process(runs):
    """The average in shards is what the first process gathered for the pipeline; the weights under training are not."""
    source = Source.read(runs / "shards")
    shown = whole_model(source, torch.float32)
    average, weights = (trainers_model(source, kind, torch.float32) for kind in ("average", "weights"))
    for part in ("ar", "dit"):
        wanted = dict(shown.module(part).named_parameters())
        found, raw = average.trainable(part), weights.trainable(part)
        assert found.keys() == raw.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
        others = {name for name in raw if not torch.equal(raw[name], wanted[name])}
        assert others or part == "ar"  # whose plans may all have the same reward


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_runs_write_what_one_process_writes(runs, kind):
    alone = f"{kind}-on-one"
    trainer_of(runs, BATCH, *KINDS[kind], f"output_dir={runs}/{alone}").train()
    left, right = ((runs / name / "checkpoints/step-000002") for name in (alone, kind))
    folders = sorted(path.name for path in left.iterdir())
    assert folders == sorted(path.name for path in right.iterdir())
    assert ("pipeline" in folders) == (kind != "adapters-alone")
    assert read_manifest(left).states == read_manifest(right).states
    moved = furthest(tensors(runs, alone, 1), tensors(runs, alone, 2))
    assert moved > 1e-4
    assert furthest(tensors(runs, alone, 2), tensors(runs, kind, 2)) <= 0.01 * moved
    files = sorted(path for each in folders if each != "states" for path in (left / each).glob("**/*.safetensors"))
    assert files
    for file in files:
        assert furthest(load_file(file), load_file(right / file.relative_to(left))) <= 0.01 * moved, file


@pytest.mark.parametrize("damage", ["missing", "truncated", "another run's"])
def test_a_resume_refuses_a_shard_that_is_not_what_was_written(runs, tmp_path, damage):
    whole, folder = runs / "shards/checkpoints/step-000004", tmp_path / "step-000004"
    shutil.copytree(whole, folder)
    shard = "states/dit_optimizer/shard-00002-model-00001-of-00001.safetensors"
    if damage == "missing":
        (folder / shard).unlink()
    elif damage == "truncated":
        with (folder / shard).open("r+b") as file:
            file.truncate((whole / shard).stat().st_size - 4)
    else:
        shutil.copy(runs / "shards/checkpoints/step-000002" / shard, folder / shard)
    with pytest.raises(CheckpointError, match=shard):
        resolve_resume(tmp_path, str(folder))


def test_the_pipeline_is_that_of_one_process(runs):
    for part in ("vision_language_encoder/model", "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        files = [
            load_file(runs / name / "checkpoints/step-000004/pipeline" / f"{part}.safetensors")
            for name in ("alone", "shards")
        ]
        assert furthest(*files) <= 1e-5
    index = [
        (runs / name / "checkpoints/step-000004/pipeline/model_index.json").read_text() for name in ("alone", "shards")
    ]
    assert index[0] == index[1]


def test_adapters_on_a_base_in_shards_are_those_on_a_whole_one(runs):
    for half in ("ar", "dit"):
        files = [
            load_file(runs / name / "checkpoints/step-000002" / f"lora_{half}" / "adapter_model.safetensors")
            for name in ("adapters-ddp", "adapters-fsdp")
        ]
        moved = max(value.abs().max().item() for name, value in files[0].items() if "lora_B" in name)
        assert moved > 1e-4
        assert furthest(*files) <= 0.01 * moved


def test_a_lost_shard_is_named(runs, tmp_path):
    folder = tmp_path / "ar_weights"
    shutil.copytree(runs / "shards/checkpoints/step-000004/states/ar_weights", folder)
    next(iter(sorted(folder.iterdir()))).unlink()
    known = saved_tensors(folder, [path.name for path in folder.iterdir()])
    with pytest.raises(CheckpointError, match="is not whole"):
        for tensor in known.values():
            tensor.read([0] * len(tensor.shape), [2 * side for side in tensor.shape])
