"""Of every trainer: networks are in training mode where they learn and in evaluation mode where they are judged,
and several processes exchange gradients with the last backward pass of an update alone."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from glm_training.engine.parts import Part
from glm_training.trainers.base_trainer import BaseTrainer
from tests import dmdr_runs, preference_runs, runs, vgt_runs

CHUNKS = ["training.batch_size=1", "training.gradient_accumulation_steps=3"]
GAN = ["vgt.gan.channels=32", "vgt.gan.stages=2", "vgt.gan.start_step=0", "vgt.gan.weight=0.1"]


def built(kind: str, folder: Path, *keys: str) -> BaseTrainer:
    """A trainer that is ready for a step, judged by what it could be judged by."""
    if kind in ("sdxl", "glm_image"):
        preference_runs.write_pairs(folder / "pairs")
        trainer = preference_runs.trainer_of(folder, kind, f"evaluation.eval_pairs={folder}/pairs", *keys)
        trainer.prepare()
        return trainer
    if kind in ("autoencoder", "generator"):
        return vgt_runs.trainer_of(folder, *keys, component=kind)
    if kind == "dmdr":
        return dmdr_runs.trainer_of(folder, "dmdr.update_ratio=1", *keys)
    return runs.trainer_of(folder, f"training.use_reward={str(kind == 'reward').lower()}", *keys)


@pytest.mark.parametrize("kind", ["supervised", "sdxl", "glm_image", "autoencoder", "generator"])
def test_what_learns_is_in_training_mode_and_what_is_judged_in_evaluation_mode(tmp_path, kind) -> None:
    trainer = built(kind, tmp_path)
    seen: dict[str, list[bool]] = {name: [] for name in trainer.parts}
    for name, part in trainer.parts.items():
        part.component.register_forward_pre_hook(lambda network, _, own=seen[name]: own.append(network.training))
    trainer.family.train()
    trainer.judge()
    assert all(modes and not any(modes) for modes in seen.values()), seen
    for modes in seen.values():
        modes.clear()
    trainer.family.eval()
    trainer.training_step()
    assert all(modes and all(modes) for modes in seen.values()), seen


@pytest.mark.parametrize(
    ("kind", "keys", "passes"),
    [
        ("supervised", CHUNKS, {"ar": [3], "dit": [3]}),
        ("sdxl", CHUNKS, {"unet": [3]}),
        ("glm_image", CHUNKS, {"ar": [3], "dit": [3]}),
        ("autoencoder", [*CHUNKS, *GAN], {"autoencoder": [3], "discriminator": [3]}),
        ("generator", CHUNKS, {"generator": [3]}),
        ("dmdr", CHUNKS, {"unet": [3], "guidance": [3]}),
        # 3 prompts; two updates, each of half the rows of every prompt, the DiT's at every one of 3 levels
        ("reward", [*CHUNKS, "reward.grpo.updates_per_rollout=2"], {"ar": [3, 3], "dit": [9, 9]}),
    ],
)
def test_gradients_are_exchanged_with_the_last_backward_pass_of_an_update(
    tmp_path, monkeypatch, kind, keys, passes
) -> None:
    trainer = built(kind, tmp_path, *keys)
    events: dict[str, list[bool | str]] = {name: [] for name in passes}
    inside: list[bool] = []
    backward, step = Part.backward, Part.step

    @contextmanager
    def accumulating(part: Part, last: bool):
        inside.append(last)
        yield
        inside.pop()

    def noted(part: Part, loss) -> None:
        assert len(inside) == 1, "a backward pass stands inside the context that says whether it is the last"
        events[part.name].append(inside[0])
        backward(part, loss)

    def stepped(part: Part, training_step: int) -> dict[str, float]:
        events[part.name].append("update")
        return step(part, training_step)

    monkeypatch.setattr(Part, "accumulating", accumulating)
    monkeypatch.setattr(Part, "backward", noted)
    monkeypatch.setattr(Part, "step", stepped)
    trainer.training_step()
    wanted = {name: sum(([False] * (n - 1) + [True, "update"] for n in counts), []) for name, counts in passes.items()}
    assert events == wanted
