"""The configurations that benchmarks train with, most of them too long to run here, are still ones that can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import encoding, full_width, grpo_step, kill, quickstart, rescoring, two_revisions
from benchmarks.gpu import full, tiny
from benchmarks.methods import __main__ as methods
from glm_training.config import load_config
from glm_training.config.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART, RECIPES = "configs/quickstart.yaml", "configs/recipes"


def configurations() -> Iterator[tuple[str, list[str], list[str]]]:
    """What trains, its files, and what is said after them."""
    for module in (encoding, grpo_step):
        yield module.__name__, [QUICKSTART], module.OVERRIDES
    yield "kill", [QUICKSTART], list(kill.SMALL)
    for name, overrides in quickstart.ARMS.items():
        yield f"quickstart {name}", [QUICKSTART], overrides
    for name, (file, overrides) in two_revisions.TASKS.items():
        yield f"two_revisions {name}", [file], overrides
    for name, precision in rescoring.PRECISIONS.items():
        yield f"rescoring {name}", ["benchmarks/warmth/warmth.yaml"], [*precision, *rescoring.STILL]
    for task, names in methods.TASKS.items():
        for recipe in names:
            own = f"benchmarks/methods/{recipe}.yaml"
            file = own if (ROOT / own).is_file() else f"{RECIPES}/{recipe}.yaml"
            yield (
                f"methods {task} {recipe}",
                [f"benchmarks/methods/{task}.yaml", file],
                list(methods.OVER_RECIPES.get(task, ())),
            )
    for component in full_width.GROUPS:
        yield f"full_width {component}", ["configs/t2i_training.yaml"], full_width.overrides(component, 1024, "bf16")
    for precision in ("no", "bf16", "fp16"):
        yield f"gpu.full {precision}", [QUICKSTART], [*full.GRPO, *tiny.settings("cpu", precision)]
        yield f"gpu.tiny grpo {precision}", [QUICKSTART], [*tiny.GRPO, *tiny.settings("cpu", precision)]
        for name, (file, overrides) in tiny.OTHERS.items():
            yield f"gpu.tiny {name} {precision}", [file], [*tiny.BASE, *overrides, *tiny.settings("cpu", precision)]


CONFIGURATIONS = list(configurations())


@pytest.mark.parametrize(
    ("files", "overrides"), [case[1:] for case in CONFIGURATIONS], ids=[c[0] for c in CONFIGURATIONS]
)
def test_configurations_of_benchmarks_are_read(files, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config([ROOT / file for file in files], [*overrides, f"output_dir={tmp_path}"])
    assert config.training.max_steps > 0


def test_keys_that_do_not_go_together_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    spoilt = [option for option in tiny.GRPO if "timesteps_per_sample" not in option]
    with pytest.raises(ConfigError, match="timesteps_per_sample"):
        load_config([ROOT / QUICKSTART], [*spoilt, f"output_dir={tmp_path}"])
