"""What processes compare, and how a failure of one reaches the others."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from glm_training.config import load_config
from glm_training.engine import agreement
from glm_training.engine.agreement import Fact, agree, contents_digest, losses_explained, setting_facts, together
from glm_training.engine.errors import SettingsError, TrainingError
from glm_training.models.glm_image.family import GLMImage
from glm_training.utils.distributed import DistributedError, World, gather_objects, init_world, shutdown
from tests.runs import config_of
from tests.utils.test_distributed import LAUNCH_VARIABLES, free_port

CONFIGS = Path(__file__).parents[2] / "configs"


def raised(action) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def meet_and_fail(rank: int, port: int) -> None:
    """Several ways for two processes to differ, one after the other."""
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = init_world(True, "gloo", "cpu")
    assert together(world, "adding", lambda: rank + 1) == rank + 1

    def only_on(failing: int, error: Exception):
        def action() -> None:
            if rank == failing:
                raise error

        return raised(lambda: together(world, "reading", action))

    error = only_on(1, SettingsError("no such file"))  # the user's to mend: both the same
    assert isinstance(error, DistributedError) and "reading failed on rank 1: no such file" in str(error)
    error = only_on(0, ZeroDivisionError("a bug"))  # a traceback where it happened, its name on the other
    assert type(error) is (ZeroDivisionError if rank == 0 else TrainingError)
    assert rank == 0 or "reading failed on rank 0: ZeroDivisionError: a bug" in str(error)
    same = raised(lambda: together(world, "reading", lambda: [][1]))
    assert type(same) is IndexError
    shared = raised(lambda: together(world, "reading", lambda: only_settings("same on both")))
    assert type(shared) is SettingsError

    assert agree(world, lambda: {"a": Fact("1", "one")}) == []
    found = agree(world, lambda: {"a": Fact("1", "one"), "b": Fact(str(rank), f"r{rank}")} | ({} if rank else C))
    assert found == ["b: r0 on rank 0; r1 on rank 1", "c: see on rank 0; nothing on rank 1"]
    family = GLMImage.load("tiny-random", seed=rank)
    error = raised(lambda: agreement.agree_on_weights(family, world))
    assert isinstance(error, DistributedError) and "weights of ar: " in str(error) and "weights of dit: " in str(error)

    if rank == 1:
        os._exit(0)  # as a process that was killed
    started = time.monotonic()
    with pytest.raises(TrainingError, match="another process of this run has ended") as told:
        with losses_explained(world), losses_explained(world):  # around the run, and around a step
            while True:
                gather_objects(world, rank)
    assert str(told.value).count("another process") == 1 and time.monotonic() - started < 30
    shutdown(world)


C = {"c": Fact("c", "see")}


def only_settings(text: str) -> None:
    raise SettingsError(text)


def test_a_failure_of_one_process_ends_the_others_by_name():
    fork, port = multiprocessing.get_context("fork"), free_port()
    workers = [fork.Process(target=meet_and_fail, args=(rank, port)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_one_process_raises_what_happened():
    with pytest.raises(ZeroDivisionError):
        together(World(), "dividing", lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="Connection closed by peer"), losses_explained(World()):
        raise RuntimeError("Connection closed by peer")


def test_contents_not_paths_are_compared(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "weights").write_bytes(bytes(5 << 20))
        (tmp_path / name / ".git").write_text(name)
    first = contents_digest(tmp_path / "a")
    assert first == contents_digest(tmp_path / "b")
    for place in (0, (5 << 20) - 1):  # of a large file its beginning and end
        with (tmp_path / "b/sub/weights").open("r+b") as handle:
            handle.seek(place)
            handle.write(b"x")
        assert contents_digest(tmp_path / "b") != first
        (tmp_path / "b/sub/weights").write_bytes(bytes(5 << 20))
    assert contents_digest(tmp_path / "b") == first
    (tmp_path / "b/sub/weights").write_bytes(bytes((5 << 20) + 1))
    assert contents_digest(tmp_path / "b") != first
    (tmp_path / "b/sub/weights").write_bytes(bytes(5 << 20))
    (tmp_path / "b/config.json").rename(tmp_path / "b/other.json")
    assert contents_digest(tmp_path / "b") != first


def test_what_each_node_may_have_its_own_way(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_contents", lambda path, pattern="*": Fact(Path(path).name, str(path)))
    free = ["data.num_workers=7", "data.pin_memory=false", "model.device_map=cpu", "model.local_files_only=true"]
    free += [
        f"cache.dir={tmp_path}/cache",
        f"dpo.cache_dir={tmp_path}/cache",
        f"data.target_images_dir={tmp_path}",
        "model.taesd=null",
    ]
    facts = setting_facts(config_of(tmp_path))
    assert setting_facts(config_of(tmp_path, *free)) == facts
    for override in ("training.max_steps=9", "logging.eval_interval=7", "evaluation.seed=1", "output_dir=x"):
        assert setting_facts(config_of(tmp_path, override)) != facts, override
    copies = [tmp_path / name / "weights" for name in "ab"]
    for copy in copies:
        copy.mkdir(parents=True)
    assert len({setting_facts(config_of(tmp_path, f"model.name={copy}"))["model.name"].value for copy in copies}) == 1


def test_models_by_language_are_compared_by_content(tmp_path):
    """A node's own disk may hold another file under the same name, or the same file under another one."""

    def facts(path: Path, content: bytes) -> dict[str, Fact]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        key = "reward.options.text_accuracy.model_files"
        config = config_of(tmp_path, f"{key}={{ru: {path}}}", "reward.options.text_accuracy.languages=[ru]")
        return {name: fact for name, fact in setting_facts(config).items() if name.startswith(key)}

    first, other = facts(tmp_path / "a" / "ru.onnx", b"1"), facts(tmp_path / "a" / "ru.onnx", b"2")
    moved = facts(tmp_path / "b" / "ru.onnx", b"1")
    (name,) = first
    assert name == "reward.options.text_accuracy.model_files.ru"
    assert first[name].value == moved[name].value != other[name].value


VGT = {
    "vgt.autoencoder": "vgt_ar_pretrain.yaml",
    "vgt.repa.model": "vgt_ar_pretrain.yaml",
    "vgt.lpips_weights": "vgt_ae_stage1.yaml",
    "vgt.convnext_weights": "vgt_ae_stage1.yaml",
}


@pytest.mark.parametrize("key", VGT)
def test_weights_of_vgt_are_compared_by_content(tmp_path, key):
    """Under another path they are the same, and under the same path others."""

    def told(folder: str, content: bytes) -> str:
        path = tmp_path / folder / "weights.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        place = path if key.endswith("_weights") else path.parent
        return setting_facts(load_config(CONFIGS / VGT[key], [f"{key}={place}"]))[key].value

    first, other = told("a", b"1"), told("a", b"2")
    assert told("b", b"1") == first != other


def test_the_digest_of_weights_sees_one_bit():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = agreement.weights_digest(network)
    with torch.no_grad():
        network[0].weight.view(torch.int16)[1, 2] ^= 1
    after = agreement.weights_digest(network)
    network[1].num_batches_tracked += 1  # a buffer, and an integer
    assert len({before, after, agreement.weights_digest(network)}) == 3
