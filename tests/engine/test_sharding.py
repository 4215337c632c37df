"""What shards take of memory on their way: weights come to fp32 block by block, files are let go, freed blocks too."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from glm_training.engine import sharding
from glm_training.engine.families import build_family
from glm_training.engine.setup import build_parts
from glm_training.engine.sharding import Shards, resident_bytes
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.utils.distributed import World
from tests import dmdr_runs, warm
from tests.runs import config_of

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


def test_weights_come_to_fp32_block_by_block(process_group, tmp_path, monkeypatch):
    config = config_of(tmp_path, "model.component=ar", "model.torch_dtype=bfloat16")
    family = build_family(config, World())
    units = family.sharding_units("ar")
    start = {name: value.detach().clone() for name, value in family.trainable("ar").items()}
    assert {value.dtype for value in start.values()} == {torch.bfloat16}
    wide = []

    def watched(module, **options):
        plain = {id(p): p for p in family.trainable("ar").values() if not isinstance(p, DTensor)}
        own = {id(p) for p in module.parameters()} & plain.keys()
        wide.append((module, own, {key for key, p in plain.items() if p.dtype == torch.float32}))
        return fully_shard(module, **options)

    monkeypatch.setattr(sharding, "fully_shard", watched)
    parts = build_parts(config, family, World(), 10, Shards(config, World()))
    assert [module for module, _, _ in wide] == [*units, family.ar]
    assert all(own and own == found for _, own, found in wide)
    for name, value in parts["ar"].parameters.items():
        assert isinstance(value, DTensor) and value.dtype == torch.float32
        assert torch.equal(value.full_tensor(), start[name].float())
    assert {p.dtype for module in family.frozen() for p in module.parameters()} == {torch.bfloat16}


@LINUX
def test_the_file_of_what_lies_in_shards_is_let_go(process_group, tmp_path):
    build_tiny().save_pretrained(tmp_path / "model")
    trained = tmp_path / "model/vision_language_encoder/model.safetensors"
    beside = tmp_path / "model/text_encoder/model.safetensors"
    config = config_of(tmp_path, "model.component=ar", f"model.name={tmp_path}/model")
    family = build_family(config, World())
    frozen = [value.clone() for value in family.ar.model.model.vqmodel.state_dict().values()]
    assert mapped(trained) and mapped(beside)
    parts = build_parts(config, family, World(), 10, Shards(config, World()))
    assert parts and not mapped(trained)
    assert mapped(beside)  # used whole, and shared by all processes
    for value, before in zip(family.ar.model.model.vqmodel.state_dict().values(), frozen, strict=True):
        assert torch.equal(value, before)


HOLES = """
import sys
import torch
from pathlib import Path
from glm_training.engine.sharding import give_back_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "given back":
    give_back_freed_memory()
gone = torch.ones(7 << 20)  # 28 MiB: once it is freed, glibc keeps blocks of that size
del gone
before, large, small = resident(), [], []
for _ in range(20):
    large.append(torch.ones(2 << 20))
    small.append(torch.ones(1 << 10))
del large
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.skipif(any(name.startswith("MALLOC_") for name in os.environ), reason="they set what this is about")
def test_freed_blocks_go_back_to_the_system():
    kept = {}
    for how in ("kept", "given back"):
        kept[how] = int(warm.run("-c", HOLES, how).stdout.splitlines()[-1])
    assert kept["kept"] > 32 << 20  # of the 160 MiB that were freed; how many of the holes are at the end differs
    assert kept["given back"] < 16 << 20


def test_memory_counts_trained_weights_as_they_will_be(tmp_path):
    config = config_of(tmp_path, "model.component=ar", "model.torch_dtype=bfloat16")
    family = build_family(config, World())
    trained = sum(value.numel() for value in family.trainable("ar").values())
    every = sum(p.numel() for name in family.components for p in family.component(name).parameters())
    assert resident_bytes(config, family) == 16 * trained + 2 * (every - trained)


@pytest.mark.parametrize(
    ("family", "lora"), [("sdxl", "false"), ("sdxl", "true"), ("glm_image", "true")], ids=["whole", "sdxl", "glm-image"]
)
def test_memory_counts_the_guidance_network_ahead_of_its_making(tmp_path, family, lora):
    half = [] if family == "sdxl" else ["model.component=dit"]
    wanted = ["model.torch_dtype=bfloat16", f"lora.enabled={lora}", *half]
    trainer = dmdr_runs.trainer_of(tmp_path, *wanted, family=family)
    before = resident_bytes(trainer.config, build_family(trainer.config, World()))
    own = [module for name in trainer.family.components for module in [trainer.family.component(name)]]
    held = {id(p): p for module in (*own, trainer.teacher) for p in module.parameters()}
    assert before == sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in held.values())
