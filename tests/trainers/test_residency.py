"""Phases that leave on the device only what they use: what lies there when, and that nothing else is read meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glm_training.config import ConfigError
from glm_training.engine.errors import SettingsError
from glm_training.engine.residency import CPU, Residency, units_of
from glm_training.engine.sharding import check_strategy
from glm_training.trainers.reward_trainer import RewardTrainer
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of, weights_of

DEVICE = torch.device("cuda")
"""What the device is called here: a name, to which nothing is moved."""
ADAMW = ["training.optimizer=adamw", "training.adam_beta1=0.9", "training.learning_rate=0.001"]
ADAPTERS = ["lora.enabled=true", "lora.rank=2"]
CASES = {
    "full": ["training.ema.decay=0.5", "evaluation.enabled=true", "logging.eval_interval=1"],
    "adapters": [*ADAPTERS, "rollout.rescore=true", "reward.grpo.updates_per_rollout=2"],
    "chunks": [*ADAPTERS, "training.batch_size=1", "training.gradient_accumulation_steps=2"],
    "old policy": ["reward.grpo.dit.method=nft", "reward.grpo.dit.old_decay=0.5"],
    "entropies": ["reward.grpo.ar.entropy_reward=0.4", "reward.grpo.ar.similarity_weighting=true"],
    "resampling": [*ADAPTERS, "reward.grpo.max_resamples=1"],
    "supervised between": ["training.reward_frequency=2"],
    "dit": ["model.component=dit", "evaluation.enabled=true"],
    "ar": ["model.component=ar"],
}
EDITS = [*ADAPTERS, "cache.enabled=false"]


def trainer_with(folder: Path, *keys: str, mode: str = "t2i") -> RewardTrainer:
    folder.mkdir(exist_ok=True)
    trainer = trainer_of(folder, *ADAMW, *keys, mode=mode)
    assert isinstance(trainer, RewardTrainer)
    return trainer


class Elsewhere:
    """Stands in for a second device: tensors that are away hold NaN, and get their values back when they return."""

    def __init__(self, tensors: object) -> None:
        self.tensors = tensors
        self.values: list[tuple[Tensor, Tensor]] = []

    def __call__(self, device: torch.device) -> None:
        if device == CPU and not self.values:
            self.values = [(each, each.clone()) for each in self.tensors() if each.is_floating_point()]
            for each, _ in self.values:
                each.fill_(torch.nan)
        elif device != CPU:
            for each, value in self.values:
                each.copy_(value)
            self.values = []


def held(modules: Iterable[nn.Module], trainer: RewardTrainer, name: str) -> list[Tensor]:
    found = [each.data for module in modules for each in (*module.parameters(), *module.buffers())]
    if name in trainer.parts:
        part = trainer.parts[name]
        snapshots = [part.start, part.old, part.average, None if part.ema is None else part.ema.snapshot]
        found += [value for snapshot in snapshots if snapshot is not None for value in snapshot.state_dict().values()]
    return list({each.data_ptr(): each for each in found}.values())


def remembered(trainer: RewardTrainer, name: str) -> list[Tensor]:
    states = trainer.parts[name].optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]


def part_elsewhere(trainer: RewardTrainer) -> None:
    """From here on what `trainer` does not ask for cannot be read."""
    units = {
        name: Elsewhere(lambda modules=modules, name=name: held(modules, trainer, name))
        for name, modules in trainer.family.residents().items()
    }
    units |= {f"{name} optimizer": Elsewhere(lambda name=name: remembered(trainer, name)) for name in trainer.parts}
    trainer.residency.units, trainer.residency.device = units, DEVICE
    trainer.residency.enabled = True
    save = trainer.save

    def saved() -> None:  # which reads on the CPU what lies there
        trainer.residency.only(*units)
        save()

    trainer.save = saved  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_each_phase_has_what_it_uses_alone(tmp_path):
    trainer = trainer_with(tmp_path, "training.offload_between_phases=true")
    placed, log = dict.fromkeys(trainer.residency.units, "here"), []
    own = trainer.residency.only

    def move(name: str, device: torch.device) -> None:
        placed[name] = "away" if device == CPU else "here"

    trainer.residency.units = {name: lambda device, name=name: move(name, device) for name in placed}
    trainer.residency.device = DEVICE

    def only(*names: str) -> None:
        own(*names)
        log.append({name for name, place in placed.items() if place == "here"})

    trainer.residency.only = trainer.gate.uses = only  # type: ignore[method-assign]
    trainer.training_step()
    phases = [each for before, each in zip([None, *log], log, strict=False) if each != before]
    rollout, gate = [{"vae"}, {"ar"}, {"dit", "vae"}, {"vae"}], [{"ar"}, {"dit"}]
    assert phases == [*rollout, *gate, {"ar", "ar optimizer"}, {"dit", "dit optimizer"}]


def test_units_and_what_is_encoded_once_are_the_whole_model(tmp_path):
    trainer = trainer_with(tmp_path)
    family = trainer.family
    modules = [module for each in family.residents().values() for module in each]
    modules += [family.dit.text_encoder, family.ar.model.model.visual, family.ar.model.model.vqmodel]
    found = {id(each) for module in modules for each in (*module.parameters(), *module.buffers())}
    every = [family.component(name) for name in family.components]
    assert {id(each) for module in every for each in (*module.parameters(), *module.buffers())} == found


def test_a_unit_is_moved_whole(tmp_path):
    """To the meta device, where nothing is computed: weights, the copies of them, and the moments; not the counters."""
    meta = torch.device("meta")
    keys = ["reward.grpo.dit.method=nft", "training.ema.decay=0.5", "training.max_steps=1"]
    trainer = trainer_with(tmp_path, *keys)
    trainer.train()
    for move in units_of(trainer.family.residents(), trainer.parts).values():
        move(meta)
    for name, part in trainer.parts.items():
        assert part.start is not None
        assert all(each.is_meta for each in held(trainer.family.residents()[name], trainer, name))
        assert all(each.is_meta for each in remembered(trainer, name))
        assert {state["step"].device.type for state in part.optimizer.state.values()} == {"cpu"}


def test_without_the_key_nothing_moves():
    def move(device: torch.device) -> None:
        raise AssertionError("moved")

    off = Residency({"ar": move}, DEVICE, enabled=False)
    off.only()
    off.all()
    with pytest.raises(KeyError, match="no such units: dit; there are ar"):
        Residency({"ar": move}, DEVICE, enabled=True).only("dit")


def test_room_is_made_before_anything_comes():
    moves: list[tuple[str, str]] = []
    names = ("ar", "dit", "vae")
    units = {name: lambda device, name=name: moves.append((name, device.type)) for name in names}
    Residency(units, DEVICE, enabled=True).only("ar")
    assert moves == [("dit", "cpu"), ("vae", "cpu"), ("ar", "cuda")]


def test_it_is_for_reward_steps_of_one_process(tmp_path):
    with pytest.raises(ConfigError, match="only reward steps have phases"):
        config_of(tmp_path, "training.offload_between_phases=true", "training.use_reward=false")
    config = config_of(tmp_path, "training.offload_between_phases=true")
    check_strategy(config, World())
    with pytest.raises(SettingsError, match="for one process, and there are 2"):
        check_strategy(config, World(0, 2))


@pytest.mark.parametrize(("case", "mode"), [*((case, "t2i") for case in CASES), ("edits", "i2i")])
def test_no_phase_reads_what_it_does_not_ask_for(tmp_path, case, mode):
    keys = CASES.get(case, EDITS)
    plain = trainer_with(tmp_path / "plain", *keys, mode=mode)
    plain.train()
    placed = trainer_with(tmp_path / "placed", *keys, mode=mode)
    part_elsewhere(placed)
    placed.train()
    placed.residency.all()
    expected, found = weights_of(plain), weights_of(placed)
    for part in expected:
        assert all(torch.equal(expected[part][name], found[part][name]) for name in expected[part]), part
