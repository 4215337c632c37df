"""Rewards of the user's own that go wrong: the message names the file, the line and the function, whatever it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from glm_training.rewards import (
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardError,
    RewardOptions,
    RewardResult,
    RewardSampleError,
    ScoringStopped,
    build_calculator,
    score_batch,
)
from glm_training.rewards.foreign import users_code
from glm_training.rewards.types import LARGEST_SCORE
from glm_training.utils.signals import Aborted

HEAD = (
    "from glm_training.rewards import RewardCalculator, RewardResult, RewardSampleError\nimport helper\nimport torch\n"
)
CLASS = "class Own(RewardCalculator):\n"
ONE = "    def compute_reward(self, generated_image, target_image, prompt):\n"
ALL = "    def compute_rewards(self, batch):\n"


def write(folder: Path, text: str) -> str:
    """A file of the user's, with another one beside it; the spec that names its class."""
    (folder / "helper.py").write_text("def divide(a, b):\n    return a / b\n", encoding="utf-8")
    (folder / "own.py").write_text(text, encoding="utf-8")
    sys.modules.pop("helper", None)
    return f"{folder}/own.py:Own"


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))


def grey(count: int = 2) -> RewardBatch:
    return RewardBatch(torch.zeros(count, 3, 8, 8), [f"number {row}" for row in range(count)])


def whole(spec: str, on_error: str = "error") -> RewardCalculator:
    return build_calculator(spec, {}, RewardOptions(on_error=on_error))


def metric(spec: str, on_error: str = "error") -> RewardCalculator:
    return RewardCalculator({spec: 1.0}, options=RewardOptions(on_error=on_error))


@pytest.mark.parametrize("build", [whole, metric])
def test_an_exception_names_its_place(tmp_path: Path, build) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + "        return helper.divide(1.0, len(prompt) - 8)\n")
    with pytest.raises(RewardError, match=r"Own\.compute_reward raised ZeroDivisionError: float division") as caught:
        score_batch(build(spec), grey())
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f"  {tmp_path}/own.py:6, in compute_reward: return helper.divide(1.0, len(prompt) - 8)",
        f"  {tmp_path}/helper.py:2, in divide: return a / b",
    ]
    assert not isinstance(caught.value, RewardSampleError), "on_error: skip must not hide it"
    assert isinstance(caught.value.__cause__, ZeroDivisionError), "from which the log has the traceback"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Aborted])
def test_who_stops_the_program_is_obeyed(kind) -> None:
    with pytest.raises(kind), users_code("a reward"):
        raise kind


def test_libraries_that_the_code_calls_are_not_the_place(tmp_path: Path) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + "        return torch.zeros(2) @ torch.zeros(3)\n")
    place = rf"raised RuntimeError: .* \({tmp_path}/own\.py:6, in compute_reward: return torch"
    with pytest.raises(RewardError, match=place) as caught:
        score_batch(whole(spec), grey())
    assert "site-packages" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("None", "None"),
        ("'0.5'", "'0.5'"),
        ("float('nan')", "nan"),
        ("float('-inf')", "-inf"),
        ("1e300", r"1e\+300"),
        ("10 ** 400", "1000"),
        ("1j", "1j"),
        ("__import__('numpy').complex64(1)", r"\(1\+0j\)"),
        ("__import__('numpy').ma.masked", "None"),
        ("torch.ones(2)", r"tensor\(\[1., 1.\]\)"),
        ("['x' * 8_000_000]", r"\['xxxx.* \(8000004 characters\)"),
    ],
)
@pytest.mark.parametrize("build", [whole, metric])
def test_what_is_no_score_names_the_function(tmp_path: Path, build, value: str, said: str) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + f"        return {value}\n")
    place = rf"Own\.compute_reward \({tmp_path}/own\.py:5\) returned {said}"
    with pytest.raises(RewardSampleError, match=place) as caught:
        score_batch(build(spec), grey())
    assert "it must return a finite number" in str(caught.value) and len(str(caught.value)) < 1500
    result = score_batch(build(spec, "skip"), grey())
    assert result.total.isnan().all() and result.failures.keys() == {0, 1}


NUMPY = "__import__('numpy')"


@pytest.mark.parametrize(
    "value", ["True", "3", "torch.tensor(0.5)", f"{NUMPY}.float16(0.5)", f"{NUMPY}.mean([1.0]) > 0.5", "3.4e38"]
)
def test_numbers_of_any_kind_are_scores(tmp_path: Path, value: str) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + f"        return {value}\n")
    assert score_batch(whole(spec), grey(1)).total.item() == pytest.approx(float(eval(value)))
    assert LARGEST_SCORE == torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('face')", r"raised KeyError: 'face' \(.*own\.py:6, in compute_rewards: raise KeyError"),
        ("return None", r"\(.*own\.py:5\) returned None; it must return a RewardResult"),
        ("return [0.5, 0.5]", r"returned \[0\.5, 0\.5\]; it must return a RewardResult"),
        (
            "return RewardResult(torch.zeros(3), {}, {})",
            r"own\.py:5\): total has the shape \[3\]; for 2",
        ),
        ("return RewardResult(torch.zeros(2, 1), {}, {})", r"total has the shape \[2, 1\]"),
        ("return RewardResult(0.5, {}, {})", r"total has the shape \[\]"),
        ("return RewardResult('a', {}, {})", r"raised .*Error: .*own\.py|raised TypeError"),
        ("return RewardResult(torch.zeros(2), {'a': torch.zeros(1)}, {})", r"components\['a'\] has the shape \[1\]"),
        ("return RewardResult(torch.zeros(2), None, {})", "raised AttributeError"),
        ("return RewardResult(torch.zeros(2), {}, {'x': 'y'})", "raised ValueError"),
        ("return RewardResult(torch.zeros(2), {}, {2: 'y'})", r"own\.py:5\): failures names sample 2 of 2"),
        ("return RewardResult(torch.zeros(2), {}, {-1: 'y'})", "failures names sample -1 of 2"),
        ("return RewardResult(torch.zeros(2), {'total': torch.ones(2)}, {})", "components cannot be called 'total'"),
        ("return RewardResult(torch.zeros(2), {'a\\nb': torch.ones(2)}, {})", r"components cannot be called 'a\\nb'"),
        ("return RewardResult(torch.zeros(2, dtype=torch.complex64), {}, {})", "total holds complex numbers"),
    ],
)
def test_a_batch_of_the_users_own_is_looked_at(tmp_path: Path, body: str, said: str) -> None:
    calculator = whole(write(tmp_path, HEAD + CLASS + ALL + f"        {body}\n"))
    with pytest.raises(RewardError, match=rf"Own\.compute_rewards.*{said}"):
        score_batch(calculator, grey())


@pytest.mark.parametrize("total", ["float('nan')", "float('inf')", "1e300"])
def test_a_total_that_is_no_number_is_a_missing_score(tmp_path: Path, total: str) -> None:
    text = (
        HEAD
        + CLASS
        + ALL
        + f"        return RewardResult(torch.tensor([0.5, {total}], dtype=torch.double), {{}}, {{}})\n"
    )
    spec = write(tmp_path, text)
    with pytest.raises(
        RewardSampleError, match=r"sample 1 \('number 1'\): Own\.compute_rewards .*own\.py:5\): the total"
    ):
        score_batch(whole(spec), grey())
    result = score_batch(whole(spec, "skip"), grey())
    assert result.total.isnan().tolist() == [False, True] and result.failures.keys() == {1}
    assert result.components["custom"].tolist()[0] == 0.5


def test_a_result_of_any_precision_and_device_is_brought_to_fp32(tmp_path: Path) -> None:
    body = "        total = torch.ones(2, dtype=torch.float16, requires_grad=True)\n"
    spec = write(tmp_path, HEAD + CLASS + ALL + body + "        return RewardResult(total, {'a': total}, {})\n")
    result = score_batch(whole(spec), grey())
    assert result.total.dtype == torch.float32 and not result.total.requires_grad
    assert result.components["a"].dtype == torch.float32


IMPORTS = {
    "a name that is none": ("x = 1\ny = nothing\n", r"raised NameError: .*own\.py:2, in <module>: y = nothing\)"),
    "a line that cannot be read": ("x = 1\ndef f(:\n", r"raised SyntaxError: .*own\.py:2: def f\(:\)"),
    "tabs and spaces": ("if 1:\n\tx = 1\n        y = 2\n", r"raised TabError: .*own\.py:3"),
    "a package that is missing": ("import no_such_package\n", r"needs 'no_such_package'.*own\.py:1, in <module>"),
    "a script without a guard": ("import sys\nsys.exit('no GPU')\n", r"exit\('no GPU'\).*own\.py:2.*__main__"),
    "a class that cannot be made": (
        HEAD + CLASS + "    def __init__(self):\n        helper.divide(1, 0)\n" + ONE + "        return 0.0\n",
        r"Own\.__init__ raised ZeroDivisionError(?s:.*)own\.py:6, in __init__(?s:.*)helper\.py:2, in divide",
    ),
}


@pytest.mark.parametrize("build", [whole, metric])
@pytest.mark.parametrize("kind", IMPORTS)
def test_code_that_cannot_be_loaded_names_its_place(tmp_path: Path, build, kind: str) -> None:
    text, said = IMPORTS[kind]
    with pytest.raises(RewardConfigError, match=said):
        build(write(tmp_path, text))


@pytest.mark.parametrize("kind", ["a name that is none", "a package that is missing", "a script without a guard"])
def test_a_module_that_cannot_be_imported_names_its_place(tmp_path: Path, kind: str) -> None:
    text, said = IMPORTS[kind]
    (tmp_path / "own_module_of_a_user.py").write_text(text, encoding="utf-8")
    with pytest.raises(RewardConfigError, match=said.replace(r"own\.py", r"own_module_of_a_user\.py")):
        whole("own_module_of_a_user:Own")


def test_a_check_of_the_users_own_names_its_place(tmp_path: Path) -> None:
    spec = write(
        tmp_path, HEAD + CLASS + ONE + "        return 0.0\n    def check(self):\n        helper.divide(1, 0)\n"
    )
    with pytest.raises(RewardBackendError, match=r"Own\.check raised ZeroDivisionError(?s:.*)own\.py:8, in check"):
        metric(spec).check()


def test_a_text_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    odd = "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\n"
    spec = write(tmp_path, HEAD + odd + CLASS + ONE + "        raise Odd\n")
    with pytest.raises(RewardError, match=r"raised Odd \(.*own\.py:9"):
        score_batch(whole(spec), grey())


def test_a_stop_is_heeded_between_samples(tmp_path: Path) -> None:
    calculator = whole(write(tmp_path, HEAD + CLASS + ONE + "        self.seen = prompt\n        return 0.0\n"))
    batch = grey(3)
    batch.stopped = lambda: getattr(calculator, "seen", None) == "number 1"
    with pytest.raises(ScoringStopped):
        score_batch(calculator, batch)
    assert calculator.seen == "number 1"  # type: ignore[attr-defined]


def test_a_full_device_keeps_the_remedies_of_its_phase(tmp_path: Path) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + "        raise torch.OutOfMemoryError('full')\n")
    with pytest.raises(torch.OutOfMemoryError):
        score_batch(metric(spec), grey())


def test_options_reach_a_calculator_that_does_not_keep_them(tmp_path: Path) -> None:
    init = "    def __init__(self, weights, options, device):\n        pass\n"
    spec = write(tmp_path, HEAD + CLASS + init + ONE + "        return None\n")
    assert score_batch(whole(spec, "skip"), grey()).failures.keys() == {0, 1}


def test_a_result_without_components_has_its_total_as_one(tmp_path: Path) -> None:
    spec = write(tmp_path, HEAD + CLASS + ALL + "        return RewardResult(torch.tensor([0.25, 0.5]), {}, {})\n")
    assert score_batch(whole(spec), grey()).components["custom"].tolist() == [0.25, 0.5]
    assert RewardResult(torch.zeros(1), {}).failures == {}


def test_a_class_that_scores_whole_batches_needs_no_metric(tmp_path: Path) -> None:
    """No backend of the metrics that stand in the weights is loaded, and every prompt is fine."""
    spec = write(tmp_path, HEAD + CLASS + ALL + "        return RewardResult(torch.zeros(2), {}, {})\n")
    calculator = build_calculator(spec, {"lpips": 0.5, "hps_v2": 0.5})
    calculator.check()
    assert calculator.check_prompts(["a"], False, False).problems == []


def test_a_class_that_adds_to_the_metrics_of_a_batch(tmp_path: Path) -> None:
    body = "        result = super().compute_rewards(batch)\n        result.total += 1\n        return result\n"
    calculator = build_calculator(write(tmp_path, HEAD + CLASS + ALL + body), {"structure": 1.0})
    batch = RewardBatch(torch.zeros(1, 3, 8, 8), ["a"], targets=torch.zeros(1, 3, 8, 8))
    assert score_batch(calculator, batch).total.tolist() == [2.0]


@pytest.mark.parametrize("on_error", ["error", "skip"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("quit()", "SystemExit: None"),
        ("raise __import__('asyncio').CancelledError", "CancelledError"),
        ("raise __import__('glm_training.rewards').rewards.RewardError", "RewardError"),
    ],
)
@pytest.mark.parametrize("build", [whole, metric])
def test_an_exit_is_an_error_with_its_place(tmp_path: Path, build, body: str, said: str, on_error: str) -> None:
    """A program that ends in a reward ended as if it were done, and nothing was saved."""
    spec = write(tmp_path, HEAD + CLASS + ONE + f"        {body}\n        return 0.0\n")
    with pytest.raises(
        RewardError, match=rf"Own\.compute_reward raised {said} \({tmp_path}/own\.py:6, in compute_reward"
    ):
        score_batch(build(spec, on_error), grey())


@pytest.mark.parametrize("hook", ["__init__", "check"])
def test_an_exit_before_the_training_is_an_error_too(tmp_path: Path, hook: str) -> None:
    text = HEAD + CLASS + ONE + f"        return 0.0\n    def {hook}(self):\n        raise SystemExit\n"
    with pytest.raises(RewardError, match=rf"Own\.{hook} raised SystemExit \(.*own\.py:8, in {hook}"):
        metric(write(tmp_path, text)).check()


def test_a_sample_without_score_and_reason_names_its_place(tmp_path: Path) -> None:
    spec = write(tmp_path, HEAD + CLASS + ONE + "        raise RewardSampleError\n")
    place = f"({tmp_path}/own.py:6, in compute_reward: raise RewardSampleError)"
    assert score_batch(whole(spec, "skip"), grey(1)).failures == {
        0: f"Own.compute_reward raised RewardSampleError {place}"
    }


HOOKS = {
    "too few arguments": (
        "    def compute_reward(self, image, prompt):\n        return 0.0\n",
        r"compute_reward \(.*own\.py:5\) must take \(generated_image, target_image, prompt\)",
    ),
    "arguments by name": ("    def compute_reward(self, *, image, target, prompt):\n        return 0.0\n", "must take"),
    "a coroutine": (
        "    async def compute_reward(self, image, target, prompt):\n        return 0.0\n",
        r"compute_reward \(.*own\.py:5\) is `async`",
    ),
    "a number": ("    compute_reward = 0.5\n", "compute_reward is no function but 0.5"),
    "a batch in two": (
        "    def compute_rewards(self, images, prompts):\n        return 0.0\n" + ONE + "        return 0.0\n",
        r"compute_rewards \(.*own\.py:5\) must take \(batch\)",
    ),
}


@pytest.mark.parametrize("build", [whole, metric])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_function_that_cannot_be_called_is_known_before_anything_is_drawn(tmp_path: Path, build, kind: str) -> None:
    text, said = HOOKS[kind]
    with pytest.raises(RewardConfigError, match=said):
        build(write(tmp_path, HEAD + CLASS + text))


def test_a_static_function_and_defaults_suit(tmp_path: Path) -> None:
    static = (
        "    @staticmethod\n    def compute_reward(image, target, prompt, strength=0.25):\n        return strength\n"
    )
    assert score_batch(whole(write(tmp_path, HEAD + CLASS + static)), grey()).total.tolist() == [0.25, 0.25]


CHANGES = "__import__('os').chdir('/'), torch.set_default_dtype(torch.float64), torch.set_grad_enabled(False)"


@pytest.mark.parametrize("where", ["import", "sample", "batch"])
def test_what_it_changes_in_the_process_is_set_back(tmp_path: Path, monkeypatch, where: str) -> None:
    """The run's relative paths start at the current directory, and its losses need gradients."""
    monkeypatch.chdir(tmp_path)
    text = {
        "import": HEAD + CHANGES + "\n" + CLASS + ONE + "        return 0.5\n",
        "sample": HEAD + CLASS + ONE + f"        {CHANGES}\n        return 0.5\n",
        "batch": HEAD + CLASS + ALL + f"        {CHANGES}\n        return RewardResult(torch.ones(1) / 2, {{}})\n",
    }[where]
    try:
        assert score_batch(whole(write(tmp_path, text)), grey(1)).total.tolist() == [0.5]
        assert (Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()) == (tmp_path, torch.float32, True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def test_what_it_writes_into_a_batch_is_its_own(tmp_path: Path) -> None:
    body = "        batch.images.fill_(1)\n        batch.prompts.clear()\n        batch.targets = None\n"
    spec = write(tmp_path, HEAD + CLASS + ALL + body + "        return RewardResult(torch.zeros(2), {})\n")
    batch = grey()
    batch.targets = torch.zeros(2, 3, 8, 8)
    score_batch(whole(spec), batch)
    assert not batch.images.any() and batch.prompts == ["number 0", "number 1"] and batch.targets is not None


@pytest.mark.parametrize(
    "spec", ["sys:Own", "x\0.py:Own", f"{'x' * 300}.py:Own", "~nobody-of-this-name/own.py:Own", "..:Own"]
)
def test_places_that_hold_no_class(spec: str) -> None:
    with pytest.raises(RewardConfigError, match="reward '"):
        whole(spec)
