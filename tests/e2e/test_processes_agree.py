"""Two processes of one run that differ in what decides the training: none starts, each exits 2 and says what differs
on which rank, and nothing on disk changes. Files on disks of each node's own are compared by what is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glm_training.checkpoint.commit import save_checkpoint
from glm_training.checkpoint.manifest import MANIFEST
from glm_training.engine.resuming import save_context
from glm_training.trainers.run import trainer_type
from tests.runs import config_of, write_config
from tests.warm import Program, free_port

REWARD = """\
from glm_training.rewards import RewardCalculator


class Bright(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        return {value}
"""

Case = list[dict[str, Any]]
"""What each of the two ranks is started with."""


class Pair:
    """Cases by name, for two processes in folders of their own: `node-0` and `node-1`, each with the data and a reward.
    `/proc/self/cwd` is one path that each sees as its own folder, as a path on a disk that is not shared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: dict[str, Case] = {}
        self.config = write_config(folder)
        self.nodes = [folder / f"node-{rank}" for rank in (0, 1)]
        for node in self.nodes:
            shutil.copytree(folder / "data", node / "data")
            (node / "bright.py").write_text(REWARD.format(value=0.5))

    def add(self, name: str, *overrides: str, on_1: list[str] | None = None) -> Case:
        """A case of both ranks with the same `overrides`, and those of rank 1 alone after them."""
        arguments = ["--config", str(self.config), *overrides]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        self.cases[name] = [
            {
                "environment": environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                "directory": str(self.nodes[rank]),
                "path": [],
                "arguments": arguments + (on_1 or [] if rank == 1 else []),
            }
            for rank in (0, 1)
        ]
        return self.cases[name]

    def run(self) -> list[dict[str, dict[str, Any]]]:
        """Exit code and standard error by case, of both ranks."""
        (self.folder / "cases.json").write_text(json.dumps(self.cases), encoding="utf-8")
        worker = str(Path(__file__).with_name("agreement_worker.py"))
        for program in [Program(worker, str(self.folder), rank) for rank in "01"]:
            done = program.ended()
            assert done.returncode == 0, done.stderr
        return [json.loads((self.folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def local_data(node: str = ".") -> list[str]:
    """The data as each process finds it in its own folder."""
    return [f"data.prompts_file={node}/data/prompts.txt", f"data.target_images_dir={node}/data/target_images"]


def change_image(file: Path) -> None:
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(file)


def commit(node: Path, value: float) -> Path:
    """A checkpoint of step 1 in the node's `run`, of a run with this data."""
    config = config_of(node.parent)
    dataset, _ = trainer_type(config).build_data(config)
    state = {"trainer": {"step": 1, "value": value}, "ar_optimizer": {"step": 1}}
    context = save_context(config, dataset.example_digests())
    return save_checkpoint(node / "run" / "checkpoints", 1, state, total_limit=None, metadata=context)  # type: ignore[arg-type]


def stale_disks(pair: Pair) -> None:
    """Both nodes have the folder of checkpoints under one path, and different things in it."""
    other, whole = pair.nodes[1] / "stale", pair.nodes[0] / "stale"
    shutil.copytree(pair.nodes[0] / "run", whole / "run")
    shutil.copytree(pair.nodes[1] / "run", other / "run")
    for node in pair.nodes:
        shutil.copytree(pair.nodes[0] / "run", node / "torn" / "run")
    state = pair.nodes[1] / "torn" / "run" / "checkpoints" / "step-000001" / "states" / "trainer.json"
    state.write_bytes(state.read_bytes()[:-1])
    pair.add("another latest", "output_dir=/proc/self/cwd/stale/run", "--resume", "latest")
    pair.add("no latest", "output_dir=/proc/self/cwd/none/run", "--resume", "latest")
    shutil.copytree(pair.nodes[0] / "run", pair.nodes[0] / "none" / "run")
    pair.add("torn checkpoint", "output_dir=/proc/self/cwd/torn/run", "--resume", "latest")


EXPECTED: dict[str, list[str]] = {
    "learning rate": ["training.learning_rate: 0.05 on rank 0; 0.02 on rank 1"],
    "seed": ["seed: 3 on rank 0; 4 on rank 1"],
    "order and length": ["data.shuffle: True on rank 0; False on rank 1", "max_steps: 2 on rank 0; 3 on rank 1"],
    "output folder": ["output_dir: ", "/run on rank 0; ", "/elsewhere on rank 1"],
    "prompts": ["training data, rank 1 beside rank 0: index 2: prompt or image changed"],
    "fewer prompts": ["training data, rank 1 beside rank 0: index 3: removed"],
    "image bytes": ["training data, rank 1 beside rank 0: index 1: prompt or image changed"],
    "missing image": ["preparing failed on rank 1", "prompts.txt:2", "nothing was started"],
    "reward source": ["source of the reward bright.py:Bright", "on rank 0; ", "on rank 1"],
    "library": ["version of transformers", "on rank 0; 5.99.0 on rank 1"],
    "unknown key": ["rank 1: 1 problem in the configuration", "training.lerning_rate"],
    "processes": ["rank 0 was started as one of 2 processes (WORLD_SIZE), rank 1 as one of 3"],
    "alone": ["rank 1: the launcher started 2 processes, but distributed.enabled is false"],
    "named checkpoint": ["checkpoint.resume_from: ", "on rank 0; ", "on rank 1"],
    "another latest": ["rank 1 cannot load the checkpoint that rank 0 resumes from", "is another one here"],
    "no latest": ["rank 1 cannot load the checkpoint that rank 0 resumes from", "cannot be read here"],
    "torn checkpoint": ["rank 1 cannot load the checkpoint that rank 0 resumes from", "states/trainer.json has"],
}


def lay_out(pair: Pair, trained: Path) -> None:
    prompts = (pair.folder / "data" / "prompts.txt").read_text().splitlines()
    second = pair.nodes[1]
    pair.add("learning rate", on_1=["training.learning_rate=0.02"])
    pair.add("seed", on_1=["seed=4"])
    pair.add("order and length", on_1=["data.shuffle=false", "training.max_steps=3"])
    pair.add("output folder", on_1=[f"output_dir={pair.folder}/elsewhere"])
    (second / "other.txt").write_text("\n".join([*prompts[:2], "a cat", prompts[3]]) + "\n")
    pair.add("prompts", *local_data(), on_1=["data.prompts_file=other.txt"])
    shutil.copytree(second / "data", second / "less" / "data")
    (second / "less" / "data" / "prompts.txt").write_text("\n".join(prompts[:3]) + "\n")
    (second / "less" / "data" / "target_images" / "3.png").unlink()
    pair.add("fewer prompts", *local_data(), on_1=local_data("less"))
    shutil.copytree(second / "data", second / "changed" / "data")
    change_image(second / "changed" / "data" / "target_images" / "1.png")
    pair.add("image bytes", *local_data(), on_1=local_data("changed"))
    shutil.copytree(second / "data", second / "lacking" / "data")
    (second / "lacking" / "data" / "target_images" / "1.png").unlink()
    pair.add("missing image", *local_data(), on_1=local_data("lacking"))
    (second / "bright.py").write_text(REWARD.format(value=0.6))
    pair.add("reward source", "reward.metrics={'bright.py:Bright': 1.0}")
    newer = second / "packages" / "transformers-5.99.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.0\n")
    pair.add("library")[1]["path"] = [str(newer.parent)]
    pair.add("unknown key", on_1=["training.lerning_rate=1"])
    pair.add("processes")[1]["environment"]["WORLD_SIZE"] = "3"
    pair.add("alone", on_1=["distributed.enabled=false"])
    for value, node in enumerate(pair.nodes):
        commit(node, float(value))
    pair.add("named checkpoint", "--resume", "run/checkpoints/step-000001")
    stale_disks(pair)
    shutil.copytree(second / "data", second / "nvme")
    there = ["data.prompts_file=nvme/prompts.txt", "data.target_images_dir=nvme/target_images", "data.num_workers=1"]
    once = ["training.max_steps=1", f"output_dir={trained}"]
    pair.add("same content", *local_data(), *once, on_1=there)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    pair, trained = Pair(folder), tmp_path_factory.mktemp("trained")
    lay_out(pair, trained)
    before = files_below(folder)
    ranks = pair.run()
    after = files_below(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {"ranks": ranks, "changed": changed, "trained": trained}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_none_starts_and_each_says_why(told, name):
    for rank in told["ranks"]:
        case = rank[name]
        assert case["code"] == 2, case
        for part in EXPECTED[name]:
            assert part in case["errors"], (part, case["errors"])
        assert "Traceback" not in case["errors"]


def test_nothing_on_disk_changed(told):
    own = {"cases.json", "told-0.json", "told-1.json"}
    assert {name for name in told["changed"] if "__pycache__" not in name} == own


def test_the_same_data_on_disks_of_each_own_trains(told):
    """The last case: the same content under each process' own paths, and another number of threads."""
    assert [rank["same content"]["code"] for rank in told["ranks"]] == [0, 0], told["ranks"]
    assert (told["trained"] / "checkpoints/step-000001" / MANIFEST).is_file()
