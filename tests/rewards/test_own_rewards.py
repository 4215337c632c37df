"""What is refused of a reward of one's own before anything is drawn, and a reward of whole batches as a metric."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_training.rewards import (
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardOptions,
    RewardSampleError,
    build_calculator,
    score_batch,
)

HEAD = "from glm_training.rewards import RewardCalculator, RewardResult, RewardSampleError\n\nimport torch\n"
CLASS = "class Own(RewardCalculator):\n"
ONE = "    def compute_reward(self, generated_image, target_image, prompt):\n"
ALL = "    def compute_rewards(self, batch):\n"


def write(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text, encoding="utf-8")
    return f"{folder}/own.py:Own"


def grey(count: int = 2) -> RewardBatch:
    return RewardBatch(torch.zeros(count, 3, 8, 8), [f"number {row}" for row in range(count)])


def whole(spec: str, on_error: str = "error") -> RewardCalculator:
    return build_calculator(spec, {"structure": 1.0}, RewardOptions(on_error=on_error))


def metric(spec: str, on_error: str = "error") -> RewardCalculator:
    return RewardCalculator({spec: 1.0}, options=RewardOptions(on_error=on_error))


@pytest.mark.parametrize("build", [whole, metric])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CLASS + ONE.replace("compute_reward", "compute_rewad") + "        return 0.5\n", "though 'compute_rewad'"),
        (CLASS + "    name = 'mine'\n", r"Own \(.*own\.py:4\) has neither compute_reward\(.*batch\)$"),
        (CLASS + ONE + "        score = 0.5\n", r"compute_reward \(.*own\.py:5\) returns nothing: it has no `return`"),
        (CLASS + ALL + "        return\n", r"compute_rewards \(.*own\.py:5\) returns nothing"),
        ("def Own(image):\n    return 0.5\n", r"Own \(.*own\.py:4\) is a function; make it the method compute_reward"),
        (
            "class Own:\n" + ONE + "        return 0.5\n",
            r"subclass of RewardCalculator \(.*:4\), which is imported from",
        ),
        ("class Other(RewardCalculator):\n    pass\n", r"no class 'Own'; its classes: Other$"),
    ],
)
def test_the_usual_slips_are_refused_before_anything_is_scored(tmp_path: Path, build, text: str, said: str) -> None:
    with pytest.raises(RewardConfigError, match=said):
        build(write(tmp_path, HEAD + text))


@pytest.mark.parametrize("build", [whole, metric])
def test_what_raises_alone_may_return_nothing(tmp_path: Path, build) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + "        raise RewardSampleError('not yet')\n")
    assert score_batch(build(spec, "skip"), grey()).failures.keys() == {0, 1}


def test_a_reward_of_whole_batches_is_a_metric_too(tmp_path: Path) -> None:
    lines = (
        "        total = torch.arange(3.0)\n        total[1] = float('nan')\n"
        "        return RewardResult(total, {'part': torch.ones(3)})\n"
    )
    spec = write(tmp_path, HEAD + CLASS + ALL + lines)
    calculator = RewardCalculator({spec: 3.0, "structure": 1.0}, options=RewardOptions(on_error="skip"))
    batch = RewardBatch(torch.zeros(3, 3, 8, 8), ["a", "b", "c"], torch.zeros(3, 3, 8, 8))
    result = score_batch(calculator, batch)
    assert result.total.tolist() == pytest.approx([0.25, float("nan"), (3 * 2 + 1) / 4], nan_ok=True)
    assert result.components["Own"].tolist() == pytest.approx([0.0, float("nan"), 2.0], nan_ok=True)
    assert result.components["Own/part"].tolist() == pytest.approx([1.0, float("nan"), 1.0], nan_ok=True)
    with pytest.raises(RewardSampleError, match="sample 1 .'b'.: Own: Own.compute_rewards .*the total is nan"):
        score_batch(RewardCalculator({spec: 3.0, "structure": 1.0}), batch)


def test_a_result_needs_no_components(tmp_path: Path) -> None:
    spec = write(tmp_path, HEAD + CLASS + ALL + "        return RewardResult(torch.ones(len(batch)))\n")
    assert score_batch(whole(spec), grey()).components["custom"].tolist() == [1.0, 1.0]
