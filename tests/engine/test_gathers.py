"""How halves in shards are gathered while they draw: what is asked for, or what fits, as the plan has it too."""

from __future__ import annotations

import pytest

from glm_training.engine.families import build_family
from glm_training.engine.gathers import fits_whole, gathers, lying_bytes, whole_bytes
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.planning.memory import Memory
from glm_training.planning.models import read_networks
from glm_training.planning.remedies import chosen_run
from glm_training.utils.distributed import World
from tests import dmdr_runs
from tests.runs import config_of

FSDP = "distributed.strategy=fsdp"


def sizes(config):
    """Parameters of each half and of what surrounds them, counted in the stock pipeline."""
    pipeline = build_tiny()
    vle = pipeline.vision_language_encoder
    looks = sum(p.numel() for module in (vle.model.visual, vle.model.vqmodel) for p in module.parameters())
    ar = sum(p.numel() for p in vle.parameters()) - looks
    around = looks + sum(p.numel() for module in (pipeline.vae, pipeline.text_encoder) for p in module.parameters())
    return ar, sum(p.numel() for p in pipeline.transformer.parameters()), around


@pytest.mark.parametrize("component", ["ar", "dit", "both"])
@pytest.mark.parametrize("shards", [2, 4])
def test_a_process_holds_its_share_of_what_is_trained_and_all_of_the_rest(tmp_path, component, shards):
    config = config_of(tmp_path, FSDP, f"model.component={component}", "model.torch_dtype=float32")
    family = build_family(config, World())
    ar, dit, around = sizes(config)
    trained = {"ar": ar, "dit": dit, "both": ar + dit}[component]
    assert lying_bytes(config, family, 1 / shards) == 16 * trained / shards + 4 * (ar + dit + around - trained)
    assert lying_bytes(config, family, 0.0) == 4 * (ar + dit + around - trained)
    waits = config_of(tmp_path, FSDP, f"model.component={component}", "distributed.offload=true")
    assert f"beside {4 * (ar + dit + around - trained) / 1e9:.1f} GB" in gathers(waits, family, shards, 1e9)[0].told()


def test_a_half_is_gathered_in_the_computing_dtype_without_what_stays_whole(tmp_path):
    ar, dit, _ = sizes(None)
    for keys, size in {("no",): 4, ("bf16",): 2}.items():
        config = config_of(tmp_path, FSDP, f"training.mixed_precision={keys[0]}", "model.torch_dtype=float32")
        family = build_family(config, World())
        assert [whole_bytes(config, family, part) for part in ("ar", "dit")] == [size * ar, size * dit]


def test_three_quarters_of_a_device_may_be_full():
    assert fits_whole(50.0, 25.0, 100.0) and not fits_whole(50.0, 25.1, 100.0)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_the_plan_comes_to_the_same_choice(tmp_path, mixed):
    build_tiny().save_pretrained(tmp_path / "model")
    keys = [FSDP, f"training.mixed_precision={mixed}", f"model.name={tmp_path}/model", "model.torch_dtype=float32"]
    config = config_of(tmp_path, *keys)
    family, networks = build_family(config, World()), read_networks("glm_image", str(tmp_path / "model"), None)
    lying = lying_bytes(config, family, 1 / 2)
    least = {part: (lying + whole_bytes(config, family, part)) / 0.75 for part in ("ar", "dit")}
    assert least["ar"] != least["dit"]
    for part, device in least.items():
        for nearby in (device - 1, device + 1):
            chosen = [each.part for each in gathers(config, family, 2, nearby) if each.by_block]
            assert (part in chosen) == (nearby < device)
            assert list(chosen_run(config, 2, lambda run: Memory(run, networks), nearby).by_block) == chosen


def test_what_is_asked_for_is_done(tmp_path):
    for gather, by_block in {"half": False, "block": True}.items():
        config = config_of(tmp_path, FSDP, f"distributed.gather={gather}")
        found = gathers(config, build_family(config, World()), 2, 1.0)
        assert [each.by_block for each in found] == [by_block, by_block]
        assert all(each.told().endswith(": as distributed.gather says") for each in found)


def test_a_graph_needs_weights_that_stay(tmp_path):
    config = config_of(tmp_path, FSDP, "rollout.cuda_graph=true")
    found = gathers(config, build_family(config, World()), 2, 1.0)
    assert {each.part: each.by_block for each in found} == {"ar": False, "dit": True}
    assert found[0].told().endswith(": as rollout.cuda_graph needs") and "beside" in found[1].told()


def test_a_student_has_no_choice(tmp_path):
    config = dmdr_runs.config_of(tmp_path, FSDP)
    assert gathers(config, build_family(config, World()), 2, 1.0) == []
