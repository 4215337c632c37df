"""Imports point down only and in no circle, and the parts that must start fast do not load torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glm_training"
ALLOWED = {
    "algorithms": set(),
    "utils": set(),
    "config": {"utils"},
    "checkpoint": {"utils"},
    "data": {"utils"},
    "rewards": {"algorithms", "utils"},
    "models": {"algorithms", "utils"},
    "methods": {"algorithms", "models"},
    "evaluation": {"data", "models", "rewards", "utils"},
    "engine": {"algorithms", "methods", "evaluation", "models", "rewards", "data", "checkpoint", "config", "utils"},
    "planning": {"data", "engine", "evaluation", "methods", "models", "config", "utils"},
    "doctor": {"planning", "engine", "models", "rewards", "data", "config", "utils"},
    "export": {"checkpoint", "data", "engine", "models", "config", "utils"},
    "preference": {"engine", "methods", "models", "data", "checkpoint", "config", "utils"},
    "reinforcement": {
        "engine",
        "algorithms",
        "methods",
        "evaluation",
        "models",
        "rewards",
        "data",
        "config",
        "utils",
    },
    "report": {"reinforcement", "checkpoint", "config", "utils"},
    "trainers": {
        "report",
        "reinforcement",
        "preference",
        "engine",
        "algorithms",
        "methods",
        "models",
        "rewards",
        "data",
        "evaluation",
        "checkpoint",
        "config",
        "utils",
    },
    "cli": {
        "doctor",
        "trainers",
        "report",
        "planning",
        "export",
        "engine",
        "evaluation",
        "models",
        "rewards",
        "data",
        "checkpoint",
        "config",
        "utils",
    },
}


def imported_layers(path: Path) -> set[str]:
    """Second name of every `glm_training.<layer>` that a file imports, at the top or inside functions."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "glm_training" and rest:
                layers.add(rest.split(".")[0])
    return layers


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_imports_point_down_only(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        wrong = imported_layers(path) - ALLOWED[layer] - {layer, "__version__"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_folder_of_the_package_has_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ALLOWED)


def import_graph() -> dict[str, set[str]]:
    """module -> the modules of the package that it imports, at the top, inside functions or for types alone."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    wanted.add(whole if whole in files else node.module)
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        graph[module] = (wanted & set(files)) - {module}
    return graph


def without_circles(graph: dict[str, set[str]]) -> None:
    """Raises graphlib.CycleError, which holds the circle."""
    TopologicalSorter(graph).prepare()


def test_no_module_imports_itself_in_a_circle():
    graph = import_graph()
    assert len(graph) > 150
    without_circles(graph)
    with pytest.raises(CycleError):
        without_circles(graph | {"glm_training.config.schema": {"glm_training.config.loading.load"}})


ROOMS = {
    "config": ["errors", "scalars", "sections", "schema", "docs", "checks", "loading"],
    "reinforcement": [
        "rollout",
        "credit",
        "remarks",
        "scoring",
        "resampling",
        "monitors",
        "plan_share",
        "kept",
        "gate",
        "updates",
        "token_credit",
    ],
}
"""Rooms of a layer from the bottom up: each imports only from those before it."""


@pytest.mark.parametrize("layer", sorted(ROOMS))
def test_rooms_of_a_layer_import_downwards_only(layer):
    order, prefix = ROOMS[layer], f"glm_training.{layer}."
    found = {path.stem for path in (PACKAGE / layer).iterdir()} - {"__init__", "__pycache__"}
    assert found == set(order)
    for module, wanted in import_graph().items():
        if not module.startswith(prefix):
            continue
        room = module.removeprefix(prefix).split(".")[0]
        below = order[: order.index(room) + 1]
        wrong = {
            name for name in wanted if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] not in below
        }
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_algorithms_import_torch_alone():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                head = name.split(".")[0]
                assert head in {"torch", "glm_training", "__future__"} or head in sys.stdlib_module_names, (path, name)


def test_scripts_are_thin():
    for name in ("train.py", "train_ar.py", "train_dit.py", "test_installation.py"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 30


def test_files_and_functions_stay_short():
    for path in [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, (path, node.name)


def test_the_package_itself_needs_no_torch_but_for_the_reward_classes():
    code = (
        "import sys\n"
        "import glm_training\n"
        "assert 'torch' not in sys.modules\n"
        "from glm_training import RewardBatch, RewardCalculator, RewardResult\n"
        "import glm_training.rewards as rewards\n"
        "assert RewardCalculator is rewards.RewardCalculator and RewardResult is rewards.RewardResult\n"
        "assert RewardBatch is rewards.RewardBatch and not hasattr(glm_training, 'RewardCalculater')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["train.py", "train_ar.py", "train_dit.py"])
def test_help_needs_no_torch_and_half_a_second(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    # processor time of the child: a busy machine stretches the clock on the wall
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
    assert after.children_user - before.children_user + after.children_system - before.children_system < 0.5
