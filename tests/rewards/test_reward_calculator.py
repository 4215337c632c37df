"""Totals, weights, failures and users' own rewards."""

import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from glm_training.rewards import (
    LpipsOptions,
    RewardBackendError,
    RewardBatch,
    RewardCalculator,
    RewardConfigError,
    RewardError,
    RewardOptions,
    RewardSampleError,
    TextAccuracyOptions,
    build_calculator,
    weighted_total,
)
from glm_training.rewards.types import MetricScores

HERE = str(Path(__file__))
NAN = math.nan


class Brightness(RewardCalculator):
    """Mean pixel in [0, 1]; refuses prompts that say so."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        if "refuse" in prompt:
            raise RewardSampleError("refused by the prompt")
        assert generated_image.mode == "RGB"
        return sum(generated_image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) / 3 / 255


class HasTarget(RewardCalculator):
    """1 with a target image, else 0; has an __init__ of its own that never calls ours."""

    def __init__(self) -> None:
        self.calls = 0

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        self.calls += 1
        return float(target_image is not None)


class AddsToTheMetrics(RewardCalculator):
    """The weighted metrics plus one."""

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        return super().compute_reward(generated_image, target_image, prompt) + 1


class Returns(RewardCalculator):
    """Returns whatever the prompt spells."""

    answers = {"nan": NAN, "none": None, "text": "0.5", "tensor": torch.tensor(0.5), "int": 1, "vector": torch.ones(2)}

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        return self.answers[prompt]  # type: ignore[return-value]


class Hungry(RewardCalculator):
    """Wants an argument nobody has."""

    def __init__(self, appetite: int) -> None:
        super().__init__()

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        return 0.0


class Plain(RewardCalculator):
    """Overrides nothing."""


class Unrelated:
    """Not a calculator."""


class Spoken:
    """A metric that scores each sample by the number that its prompt says, and those without a number not at all; what
    says "refused" is a failure of its own."""

    needs = "a number in the prompt"

    def check(self) -> None:
        """Nothing to load."""

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        return prompt.startswith("says ")

    def score(self, batch: RewardBatch) -> MetricScores:
        said = [prompt.removeprefix("says ") for prompt in batch.prompts]
        failures = {row: "no wish to" for row, word in enumerate(said) if word == "refused"}
        return MetricScores(torch.tensor([NAN if word == "refused" else float(word) for word in said]), failures)


BRIGHTNESS = f"{HERE}:Brightness"


def grey(*levels: float, side: int = 16) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, side, side).clone()


def batch(*levels: float, prompts: list[str] | None = None, targets: torch.Tensor | None = None) -> RewardBatch:
    return RewardBatch(grey(*levels), prompts or [f"prompt {row}" for row in range(len(levels))], targets)


def test_weights_renormalise_over_the_metrics_that_apply() -> None:
    components = {
        "a": torch.tensor([0.2, NAN, 0.5, NAN]),
        "b": torch.tensor([0.8, 0.4, NAN, NAN]),
        "c": torch.tensor([1.0, 1.0, 1.0, 1.0]),
    }
    total = weighted_total(components, {"a": 2, "b": 1, "c": 1})
    expected = [(0.4 + 0.8 + 1.0) / 4, (0.4 + 1.0) / 2, (1.0 + 1.0) / 3, 1.0]
    assert total.tolist() == pytest.approx(expected)


def test_weights_are_relative() -> None:
    components = {"a": torch.tensor([0.2, 0.6]), "b": torch.tensor([1.0, 0.0])}
    assert torch.equal(weighted_total(components, {"a": 0.3, "b": 0.1}), weighted_total(components, {"a": 30, "b": 10}))


def test_a_sample_without_any_metric_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"none of the metrics \['a'\] applies to sample\(s\) \[1\]"):
        weighted_total({"a": torch.tensor([1.0, NAN])}, {"a": 1})
    with pytest.raises(RewardError, match=r"text_accuracy.*\[0, 1\]"):
        RewardCalculator({"text_accuracy": 1}).compute_rewards(batch(0.1, 0.2))


def test_other_weights_on_the_same_scores() -> None:
    result = RewardCalculator({BRIGHTNESS: 1, "structure": 1}).compute_rewards(batch(0.2, 0.6, targets=grey(0.2, 0.6)))
    assert result.total_for({"structure": 5}).tolist() == pytest.approx([1, 1])
    assert result.total_for({BRIGHTNESS: 1}).tolist() == pytest.approx([0.2, 0.6])
    with pytest.raises(RewardConfigError, match="aesthetic"):
        result.total_for({"aesthetic": 1})


def test_weight_zero_is_logged_but_not_counted() -> None:
    result = RewardCalculator({BRIGHTNESS: 1, "structure": 0}).compute_rewards(batch(0.2, targets=grey(0.8)))
    assert result.total.item() == pytest.approx(0.2)
    assert result.components["structure"].item() < 1


def test_logged_means_equal_the_hand_means() -> None:
    calculator = RewardCalculator({BRIGHTNESS: 3, "text_accuracy": 1})
    blank = batch(0.2, 0.4, 1.0, prompts=["a", "b", 'a "SIGN"'])
    means = calculator.compute_rewards(blank).means()
    assert means["Brightness"] == pytest.approx((0.2 + 0.4 + 1.0) / 3)
    assert means["text_accuracy"] == 0.0  # the blank image shows no SIGN; the other two samples do not count
    assert means["total"] == pytest.approx((0.2 + 0.4 + 0.75) / 3)
    assert "text_accuracy" not in calculator.compute_rewards(batch(0.5)).means()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one metric"),
        ({"structure": 0}, "at least one metric"),
        ({"structure": -1}, "finite and >= 0"),
        ({"structure": NAN}, "finite and >= 0"),
        ({"asthetic": 1}, "unknown reward metric 'asthetic'.*did you mean 'aesthetic'"),
    ],
)
def test_bad_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(RewardConfigError, match=message):
        RewardCalculator(weights)


def test_the_one_sample_hook_equals_the_batch() -> None:
    calculator = RewardCalculator({"structure": 1})
    images = (grey(0.2, 0.8) * 255).round() / 255
    totals = calculator.compute_rewards(RewardBatch(images, ["a", "b"], targets=images.flip(0))).total
    one = Image.new("RGB", (16, 16), (51, 51, 51))
    other = Image.new("RGB", (16, 16), (204, 204, 204))
    assert calculator.compute_reward(one, other, "a") == pytest.approx(totals[0].item())


def test_a_subclass_is_the_whole_reward() -> None:
    calculator = build_calculator(BRIGHTNESS, {"lpips": 0.4, "aesthetic": 0.6})
    calculator.check()
    result = calculator.compute_rewards(batch(0.2, 0.8))
    assert list(result.components) == ["custom"]
    assert result.total.tolist() == pytest.approx([0.2, 0.8])


def test_a_subclass_may_keep_its_own_init_and_sees_the_target() -> None:
    calculator = build_calculator(f"{HERE}:HasTarget", {"structure": 1}, RewardOptions(on_error="skip"))
    assert calculator.compute_rewards(batch(0.1, 0.2)).total.tolist() == [0, 0]
    assert calculator.compute_rewards(batch(0.1, 0.2, targets=grey(1, 1))).total.tolist() == [1, 1]
    assert vars(calculator)["calls"] == 4


def test_a_subclass_may_build_on_the_metrics() -> None:
    calculator = build_calculator(f"{HERE}:AddsToTheMetrics", {"structure": 1})
    assert calculator.compute_rewards(batch(0.4, targets=grey(0.4))).total.item() == pytest.approx(2.0, abs=1e-3)


def test_a_subclass_is_one_metric_among_others() -> None:
    calculator = RewardCalculator({BRIGHTNESS: 1, "structure": 3})
    result = calculator.compute_rewards(batch(0.2, targets=grey(0.2)))
    assert result.components["Brightness"].item() == pytest.approx(0.2)
    assert result.total.item() == pytest.approx((0.2 + 3) / 4)


def test_no_spec_builds_ours() -> None:
    assert type(build_calculator(None, {"structure": 1}, RewardOptions(), "cpu")) is RewardCalculator


@pytest.mark.parametrize("answer", ["nan", "none", "text", "vector"])
def test_a_reward_that_is_no_number_is_an_error(answer: str) -> None:
    calculator = build_calculator(f"{HERE}:Returns", {})
    with pytest.raises(RewardSampleError, match=rf"sample 1 \('{answer}'\): Returns.compute_reward .* returned"):
        calculator.compute_rewards(batch(0.1, 0.1, prompts=["tensor", answer]))


def test_tensors_and_integers_are_numbers() -> None:
    result = build_calculator(f"{HERE}:Returns", {}).compute_rewards(batch(0.1, 0.1, prompts=["tensor", "int"]))
    assert result.total.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("weights", [{"structure": 1, BRIGHTNESS: 1}, None], ids=["metric", "whole"])
def test_skipped_samples_are_counted_and_change_no_other(weights: dict[str, float] | None) -> None:
    options = RewardOptions(on_error="skip")
    calculator = RewardCalculator(weights, options=options) if weights else Brightness(options=options)
    good = batch(0.2, 0.4, 0.6, targets=grey(0.2, 0.4, 0.6))
    reference = calculator.compute_rewards(good)
    good.prompts[1] = "please refuse"
    result = calculator.compute_rewards(good)
    assert result.skipped == 1 and "refused by the prompt" in result.failures[1]
    assert result.total.isnan().tolist() == [False, True, False]
    assert torch.equal(result.total[[0, 2]], reference.total[[0, 2]])
    assert all(values[1].isnan() for values in result.components.values())
    assert result.means()["total"] == pytest.approx(reference.total[[0, 2]].mean().item())
    with pytest.raises(RewardSampleError, match=r"1 of 3 samples.*\n.*sample 1 \('please refuse'\)"):
        (RewardCalculator(weights) if weights else Brightness()).compute_rewards(good)


@pytest.mark.parametrize("role", ["generated", "target", "source"])
def test_broken_images_are_failures_not_missing_metrics(role: str) -> None:
    pictures = {name: grey(0.2, 0.4, 0.6) for name in ("generated", "target", "source")}
    pictures[role][0, 0, 3, 3] = NAN
    broken = RewardBatch(pictures["generated"], ["a", "b", "c"], pictures["target"], pictures["source"])
    with pytest.raises(RewardSampleError, match=f"sample 0 .*its {role} image has non-finite pixels"):
        RewardCalculator({"structure": 1}).compute_rewards(broken)
    skip = RewardOptions(on_error="skip")
    for calculator, scores in (
        (RewardCalculator({"structure": 1}, options=skip), [NAN, 1.0, 1.0]),
        (Brightness(options=skip), [NAN, 0.4, 0.6]),
    ):
        found = calculator.compute_rewards(broken).total
        torch.testing.assert_close(found, torch.tensor(scores), equal_nan=True)


@pytest.mark.parametrize("score", ["nan", "inf", "-inf"])
def test_a_metrics_score_that_is_no_number_is_a_failure_of_its_own_sample(score: str) -> None:
    """In a batch where the metric scores the second, fourth and fifth sample."""
    prompts = ["a dog", f"says {score}", "a cat", "says 0.25", "says refused"]
    calculators = [RewardCalculator({BRIGHTNESS: 1}, options=RewardOptions(on_error=way)) for way in ("skip", "error")]
    for calculator in calculators:
        calculator._metrics = {"spoken": Spoken(), **calculator._metrics}
        calculator.weights = {"spoken": 3, "Brightness": 1}
    given = batch(0.2, 0.4, 0.6, 0.8, 1.0, prompts=prompts)
    result = calculators[0].compute_rewards(given)
    assert result.failures == {1: f"spoken: the score is {score}", 4: "spoken: no wish to"}
    expected = torch.tensor([0.2, NAN, 0.6, (3 * 0.25 + 0.8) / 4, NAN])
    torch.testing.assert_close(result.total, expected, equal_nan=True)
    own = torch.tensor([NAN, NAN, NAN, 0.25, NAN])
    torch.testing.assert_close(result.components["spoken"], own, equal_nan=True)
    other = torch.tensor([0.2, NAN, 0.6, 0.8, NAN])
    torch.testing.assert_close(result.components["Brightness"], other, equal_nan=True)
    with pytest.raises(RewardSampleError, match=rf"2 of 5 samples.*\n.*sample 1 \('says {score}'\)") as caught:
        calculators[1].compute_rewards(given)
    assert "sample 4 ('says refused'): spoken: no wish to" in str(caught.value)


@pytest.mark.parametrize("role", ["generated", "target", "source"])
@pytest.mark.parametrize(("pixel", "refused"), [(-0.002, True), (-0.0005, False), (1.0005, False), (1.002, True)])
def test_no_picture_may_leave_the_unit_range_by_more_than_a_rounding(role: str, pixel: float, refused: bool) -> None:
    pictures = {name: grey(0.5) for name in ("generated", "target", "source")}
    pictures[role][0, 0, 0, 0] = pixel
    given = RewardBatch(pictures["generated"], ["a"], pictures["target"], pictures["source"])
    calculator = RewardCalculator({"structure": 1})
    if refused:
        with pytest.raises(RewardError, match=rf"{role} images must lie in \[0, 1\], found \["):
            calculator.compute_rewards(given)
    else:
        assert calculator.compute_rewards(given).total.item() == pytest.approx(1, abs=0.05)


def test_images_outside_the_unit_range_are_refused() -> None:
    with pytest.raises(RewardError, match=r"generated images must lie in \[0, 1\], found \[-1, "):
        RewardCalculator({"structure": 1}).compute_rewards(batch(-1.0, 0.5, targets=grey(0, 0)))


def test_a_batch_whose_sizes_disagree_is_refused() -> None:
    with pytest.raises(ValueError, match="RewardBatch.targets must be"):
        RewardBatch(grey(0.1, 0.2), ["a", "b"], targets=grey(0.1))


def test_check_lists_every_missing_backend(tmp_path: Path) -> None:
    options = RewardOptions(
        lpips=LpipsOptions(tmp_path / "none.pth"), text_accuracy=TextAccuracyOptions(languages=("klingon",))
    )
    with pytest.raises(RewardBackendError) as caught:
        RewardCalculator({"lpips": 1, "structure": 1, "text_accuracy": 1}, options=options).check()
    assert "none.pth" in str(caught.value) and "klingon" in str(caught.value)


def test_check_prompts_names_samples_without_a_metric() -> None:
    calculator = RewardCalculator({"text_accuracy": 1, "structure": 0})
    report = calculator.check_prompts(['a "SIGN"', "the dog's bowl", "plain"], True, False)
    assert len(report.problems) == 1
    assert "2 samples: 1 (\"the dog's bowl\"), 2 ('plain')" in report.problems[0]
    assert report.applies == {"text_accuracy": 1, "structure": 3}
    assert "text_accuracy applies to 1 of 3" in report.notes[0]


def test_check_prompts_names_metrics_without_their_image() -> None:
    calculator = RewardCalculator({"lpips": 1, "structure": 1, BRIGHTNESS: 1})
    without = calculator.check_prompts(["a", "b"], False, False)
    assert [problem.split(" needs")[0] for problem in without.problems] == ["lpips", "structure"]
    assert calculator.check_prompts(["a", "b"], False, True).problems[0].startswith("lpips needs a target image")
    assert calculator.check_prompts(["a", "b"], [True, False], [False, False]).problems == []
    only = calculator.check_prompts(["a"], False, False, weights={"lpips": 1})
    assert any("no metric of ['lpips'] applies to 1 sample" in problem for problem in only.problems)


def test_modules_in_the_current_directory_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bundle_of_rewards.py").write_text(Path(HERE).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    result = RewardCalculator({"bundle_of_rewards:Brightness": 1}).compute_rewards(batch(0.2))
    assert result.total.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:Reward", "no module 'no_such_module' in .* or in the installed packages"),
        ("no/such/file.py:Reward", "no file .*no/such/file.py"),
        (f"{HERE}:Brightnes", "has no class 'Brightnes'; its classes: .*Brightness"),
        (f"{HERE}:Unrelated", "Unrelated must be a subclass of RewardCalculator"),
        (f"{HERE}:Hungry", "appetite|nothing"),
        (":Reward", "module:Class"),
    ],
)
def test_specs_that_lead_nowhere_name_what_was_tried(spec: str, message: str) -> None:
    with pytest.raises(RewardConfigError, match=message):
        build_calculator(spec, {"structure": 1})
    with pytest.raises(RewardConfigError):
        RewardCalculator({spec: 1})


def test_a_module_that_misses_a_package_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_a_package.py").write_text("import not_a_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardConfigError, match="module needs_a_package needs 'not_a_package'"):
        build_calculator("needs_a_package:Reward", {})


def test_a_file_that_misses_a_package_says_which(tmp_path: Path) -> None:
    path = tmp_path / "needs_more.py"
    path.write_text("import not_a_package\n")
    with pytest.raises(RewardConfigError, match=f"{path} needs 'not_a_package'"):
        build_calculator(f"{path}:Reward", {})


def test_a_class_of_ones_own_must_override_a_hook() -> None:
    for build in (lambda spec: RewardCalculator({spec: 1}), lambda spec: build_calculator(spec, {"structure": 1})):
        with pytest.raises(RewardConfigError, match=r"Plain \(.*\.py:\d+\) has neither compute_reward"):
            build(f"{HERE}:Plain")


class Unreachable(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        raise ConnectionError("no route to host")


def test_what_a_users_code_raises_becomes_a_reward_error_that_names_it() -> None:
    batch = RewardBatch(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a dog"])
    with pytest.raises(
        RewardError, match="Unreachable.compute_reward raised ConnectionError: no route to host"
    ) as caught:
        Unreachable().compute_rewards(batch)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert not isinstance(caught.value, RewardSampleError)  # on_error: skip must not hide it
