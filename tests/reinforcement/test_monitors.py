"""Hacking monitors: what trips them, what they say, what a stop leaves behind, and that a control passes."""

from __future__ import annotations

import json

import pytest
import torch

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.config.sections.monitors import MonitorsConfig
from glm_training.evaluation.held_out import Evaluation
from glm_training.evaluation.image_statistics import NAMES
from glm_training.reinforcement.monitors.limits import TEXTS, Limit, limits_of
from glm_training.reinforcement.monitors.monitors import Monitors, Series
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

BRIGHTNESS = """
from glm_training.rewards import RewardCalculator
from PIL import ImageStat


class Brightness(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        return sum(ImageStat.Stat(generated_image).mean) / 3 / 255
"""
HACKABLE = [
    "model.component=dit",
    "model.dit.num_inference_steps=4",
    "training.optimizer=adamw",
    "training.adam_beta1=0.9",
    "training.learning_rate=5e-3",
    "training.max_grad_norm=1",
    "training.max_steps=11",
    "reward.metrics=null",
    "reward.weights={structure: 1.0}",
    "reward.grpo.num_samples=8",
    "reward.grpo.kl_coef=0",
    "reward.grpo.dit.method=nft",
    "reward.grpo.dit.timesteps_per_sample=2",
    "reward.monitors.action=stop",
    "reward.monitors.window=2",
    "reward.monitors.brightness_change=0.15",
    "reward.monitors.diversity_fall=null",  # falls too, and is not what this is about
]


def brightness_run(folder, *overrides: str):
    (folder / "hack.py").write_text(BRIGHTNESS)
    return trainer_of(folder, *HACKABLE, f"reward.calculator={folder}/hack.py:Brightness", *overrides)


def figures_of(folder, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_reward_for_brightness_trips_before_the_picture_is_white(tmp_path):
    result = brightness_run(tmp_path).train()
    bright = figures_of(tmp_path, "monitor/brightness")
    assert result.halted is not None and result.stopped_by is None
    assert result.halted.startswith(f"monitor brightness: {sum(bright[-2:]) / 2:.3g} at step {result.step} from")
    assert "more than half of that since step" in result.halted and "take for quality" in result.halted
    assert "reward.monitors.brightness_change" in result.halted
    assert result.step < 11 and max(bright) < 0.9
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == f"step-{result.step:06d}"
    assert load_checkpoint(checkpoints / f"step-{result.step:06d}")["monitors"]["brightness"]["tripped"] == result.step
    assert "monitor brightness" in (tmp_path / "run" / "train.log").read_text()


def test_its_control_with_shuffled_advantages_does_not_trip(tmp_path):
    result = brightness_run(tmp_path, "reward.grpo.shuffle_advantages=true").train()
    assert result.halted is None and result.step == 11


def settings_of(**changes) -> MonitorsConfig:
    return MonitorsConfig.model_validate(changes)


def monitors(tmp_path, *overrides: str) -> Monitors:
    return Monitors(config_of(tmp_path, "reward.monitors.window=2", *overrides), World())


def feed(watch: Monitors, *values: float, name: str = "monitor/saturation", first: int = 1) -> list[str]:
    for step, value in enumerate(values, start=first):
        watch.after_step(step, {name: value})
    return list(watch.take_messages())


def flat(*levels: float) -> torch.Tensor:
    """[len(levels), 3, 8, 8]: greys."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_what_is_looked_at_is_averaged_over_groups_however_many_a_chunk_holds(tmp_path):
    """Groups (.2, .4), (0, .8) and (1, 1): means .3, .4 and 1; apart by .2, .8 and 0; one is half black, one white."""
    figures = monitors(tmp_path).look([(flat(0.2, 0.4), 2), (flat(0.0, 0.8, 1.0, 1.0), 2)])
    assert set(figures) == {f"monitor/{name}" for name in (*NAMES, "diversity")}
    assert figures["monitor/brightness"] == pytest.approx(1.7 / 3, rel=1e-6)
    assert figures["monitor/diversity"] == pytest.approx(1 / 3, rel=1e-6)
    assert figures["monitor/clipped"] == pytest.approx(0.5, rel=1e-6)
    assert figures["monitor/saturation"] == 0 and figures["monitor/edges"] == pytest.approx(0, abs=1e-6)
    alone = monitors(tmp_path).look([(flat(0.2, 0.6), 1)])
    assert "monitor/diversity" not in alone and alone["monitor/brightness"] == pytest.approx(0.4, rel=1e-6)


def limit(kind: str, allowed: float = 0.25) -> Limit:
    return Limit("some_key", allowed, kind, "It moved.", "Look.")


@pytest.mark.parametrize(
    ("kind", "start", "now", "used"),
    [
        ("change", 0.2, 0.3, 0.5),
        ("change", 0.2, 0.1, 0.5),
        ("change", -0.2, 0.1, 1.5),
        ("change", 0.0, 2e-6, 2.0),  # a start of zero counts as 1e-6
        ("share", 0.2, 0.3, 0.5),
        ("share", 0.75, 0.875, 0.5),  # half of the way to white
        ("share", 0.75, 0.5, 1.0),
        ("share", 1.0, 0.0, 1e6),
        ("relative_fall", 0.4, 0.1, 0.75),
        ("relative_fall", 0.4, 0.5, -0.25),
        ("rise", 0.1, 0.4, 0.3),
        ("rise", 0.4, 0.1, -0.3),
        ("fall", 0.8, 0.7, 0.1),
        ("fall", 0.7, 0.8, -0.1),
        ("value", 9.0, 0.3, 0.3),
    ],
)
def test_how_much_of_a_limit_is_used(kind, start, now, used):
    assert limit(kind).used(start, now) == pytest.approx(used)
    assert limit(kind).used(start, float("nan")) == float("inf")
    assert limit(kind).absolute == (kind == "value")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("change", "monitor x: 0.1 at step 9 from 0.4 at the start (-75%, allowed +/-25%)"),
        ("share", "monitor x: 0.1 at step 9 from 0.4 at the start (-75%, allowed +/-25%)"),
        ("relative_fall", "monitor x: 0.1 at step 9 from 0.4 at the start (-75%, allowed -25%)"),
        ("fall", "monitor x: 0.1 at step 9 from 0.4 at the start (-0.3, allowed -0.25)"),
        ("rise", "monitor x: 0.1 at step 9 from 0.4 at the start (-0.3, allowed 0.25)"),
        ("value", "monitor x: 0.1 at step 9 (0.1, allowed 0.25)"),
    ],
)
def test_a_message_says_by_how_much_since_when_and_what_to_do(kind, says):
    rest = "; more than half of that since step 6. It moved. Look. The limit is reward.monitors.some_key"
    assert limit(kind).message("x", 9, 0.4, 0.1, 6) == says + rest


def test_light_pictures_that_grow_lighter_trip_and_the_message_says_relative_to_what(tmp_path):
    """From .8 no brightness is 40 % higher; .9 is half of the way to white."""
    (message,) = feed(monitors(tmp_path), 0.8, 0.8, 0.9, 0.9, name="monitor/brightness")
    assert "0.9 at step 4 from 0.8 at the start (+50% of the distance to 1, allowed +/-40%)" in message
    assert feed(monitors(tmp_path), 0.8, 0.8, 0.86, 0.86, name="monitor/brightness") == []


def test_a_series_keeps_its_first_and_its_latest_values():
    series = Series()
    assert [series.add(value, 2) for value in (1.0, 3.0, 5.0, 9.0)] == [False, False, True, True]
    assert (series.first, series.start, series.latest, series.now) == ([1.0, 3.0], 2.0, [5.0, 9.0], 7.0)
    assert (series.departed, series.tripped, series.closed) == (None, None, False)


def test_a_figure_that_is_no_number_is_beyond_every_limit(tmp_path):
    watch = monitors(tmp_path, "reward.monitors.saturation_change=0.5")
    (message,) = feed(watch, 0.2, 0.2, float("nan"))
    assert message.startswith("monitor saturation: nan at step 3 from 0.2 at the start")


def test_it_has_departed_when_more_than_half_of_the_limit_is_used_and_no_sooner(tmp_path):
    watch = monitors(tmp_path, "reward.monitors.window=1", "reward.monitors.clipped_rise=0.5")
    for step, value in enumerate((0.0, 0.25, 0.375, 0.25, 0.375, 0.5), start=1):
        watch.after_step(step, {"monitor/clipped": value})
    series = watch.series["clipped"]
    assert (series.departed, series.tripped, watch.messages) == (5, None, [])  # a half is not more than a half
    watch.after_step(7, {"monitor/clipped": 0.625})
    assert (series.departed, series.tripped, len(watch.messages)) == (5, 7, 1)


def test_what_was_logged_before_a_resume_is_judged_without_a_word(tmp_path):
    watch = held_out(tmp_path, "reward.monitors.action=stop")
    before = evaluation(0.5, 0.8, 0)
    watch.recall(30, {"eval/total": 0.6, "eval/structure": 0.7, "monitor/picture_change": None}, before, None)
    assert watch.series["metric:structure"].tripped == 30 and "picture_change" not in watch.series
    assert watch.messages == [] and watch.halt is None


def test_it_warns_once_and_says_when_it_is_over(tmp_path):
    watch = monitors(tmp_path, "reward.monitors.saturation_change=0.5")
    messages = feed(watch, 0.2, 0.2, 0.2, 0.28, 0.3, 0.42, 0.4, 0.4)
    assert len(messages) == 1
    assert messages[0].startswith("monitor saturation: 0.36 at step 6 from 0.2 at the start (+80%, allowed +/-50%)")
    assert "more than half of that since step 5" in messages[0] and "Raise reward.grpo.kl_coef" in messages[0]
    assert feed(watch, 0.18, 0.2, first=9) == ["the monitor saturation is back within its limit at step 9"]
    assert len(feed(watch, 0.4, 0.4, first=11)) == 1
    assert watch.halt is None


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        ("monitor/brightness", (0.5, 0.5, 0.25, 0.25), "brightness_change=0.4"),
        ("monitor/edges", (0.1, 0.1, 0.2, 0.2), "edges_change=0.6"),
        ("monitor/clipped", (0.0, 0.0, 0.4, 0.4), "clipped_rise=0.3"),
        ("monitor/diversity", (0.2, 0.2, 0.05, 0.05), "diversity_fall=0.6"),
        ("ar/kl", (0.1, 0.6, 0.6), "ar_kl=0.5"),
        ("dit/kl", (0.1, 0.6, 0.6), "dit_kl=0.5"),
    ],
)
def test_each_figure_of_a_step_has_its_limit(tmp_path, name, values, limit):
    watch = monitors(tmp_path, "reward.monitors.action=stop", f"reward.monitors.{limit}")
    feed(watch, *values[:-1], name=name)
    feed(watch, values[-1], name=name, first=len(values))
    assert watch.halt is not None and limit.split("=")[0] in watch.halt
    off = monitors(tmp_path, "reward.monitors.action=stop", f"reward.monitors.{limit.split('=')[0]}=null")
    assert feed(off, *values, name=name) == [] and off.halt is None


def test_a_higher_diversity_or_fewer_clipped_pixels_are_no_alarm(tmp_path):
    watch = monitors(tmp_path)
    assert feed(watch, 0.1, 0.1, 0.9, 0.9, name="monitor/diversity") == []
    assert feed(watch, 0.9, 0.9, 0.0, 0.0, name="monitor/clipped") == []


def test_start_values_survive_a_resume(tmp_path):
    watch = monitors(tmp_path, "reward.monitors.saturation_change=0.5")
    feed(watch, 0.2, 0.2, 0.21)
    again = monitors(tmp_path, "reward.monitors.saturation_change=0.5")
    again.load(json.loads(json.dumps(watch.state())))
    assert feed(again, 0.4, 0.4, first=4) == feed(watch, 0.4, 0.4, first=4) != []


@pytest.mark.parametrize(
    ("before", "seen", "now", "start"),
    [
        (2, 3, 4, 0.15),  # wider: .1 and .2 are the start, no value of after the resume is
        (2, 2, 4, 0.25),  # wider, and none is lost yet: as a run that had it from the first step on
        (4, 6, 2, 0.15),  # shorter: the first two of four
        (4, 3, 2, 0.15),
        (4, 3, 4, 0.25),
    ],
)
def test_another_window_after_a_resume_takes_no_late_value_for_a_first_one(tmp_path, before, seen, now, start):
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    watch = monitors(tmp_path, f"reward.monitors.window={before}")
    feed(watch, *values[:seen])
    again = monitors(tmp_path, f"reward.monitors.window={now}")
    again.load(json.loads(json.dumps(watch.state())))
    feed(again, *values[seen:], first=seen + 1)
    assert again.series["saturation"].start == pytest.approx(start)
    assert again.series["saturation"].latest == values[-now:]


def test_a_window_that_was_shorter_for_a_while_leaves_the_start_short(tmp_path):
    watch = monitors(tmp_path, "reward.monitors.window=4")
    feed(watch, 0.1, 0.2, 0.3)
    for window in (2, 4):
        again = monitors(tmp_path, f"reward.monitors.window={window}")
        again.load(json.loads(json.dumps(watch.state())))
        watch = again
    feed(watch, 0.9, first=4)
    assert watch.series["saturation"].first == [0.1, 0.2]


def test_a_run_that_resumes_beyond_a_limit_stops_again(tmp_path):
    small = ["model.component=ar", "training.batch_size=1", "reward.grpo.num_samples=2", "reward.monitors.action=stop"]
    limit = ["reward.monitors.window=1", "training.max_steps=4"]
    first = trainer_of(tmp_path, *small, *limit, "reward.monitors.brightness_change=1e-9")
    first.monitors.series = {}
    result = first.train()
    assert result.halted is not None and result.step == 2
    latest = "checkpoint.resume_from=latest"
    again = trainer_of(tmp_path, *small, *limit, "reward.monitors.brightness_change=1e-9", latest).train()
    assert again.halted is not None and again.step == 3
    done = trainer_of(tmp_path, *small, *limit, "reward.monitors.brightness_change=null", latest).train()
    assert done.halted is None and done.step == 4


def test_what_trips_at_an_evaluation_is_in_the_checkpoint_it_stops_with(tmp_path):
    small = ["model.component=dit", "training.batch_size=1", "reward.grpo.num_samples=2", "training.max_steps=3"]
    watch = ["evaluation.enabled=true", "logging.eval_interval=1", "evaluation.num_eval_samples=1"]
    stops = ["reward.monitors.action=stop", "reward.monitors.picture_change=1e-9"]
    result = trainer_of(tmp_path, *small, *watch, *stops).train()
    assert result.halted is not None and result.step == 1
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001")
    assert saved["monitors"]["picture_change"]["tripped"] == 1


def evaluation(total: float, other: float, shade: float) -> Evaluation:
    pictures = torch.linspace(0, 1, 32 * 32).view(1, 1, 32, 32).expand(2, 3, 32, 32)
    scores = {"total": torch.full((3,), total), "structure": torch.full((3,), other)}
    return Evaluation(scores, pictures * (1 - shade) + shade * pictures.flip(2))


def held_out(tmp_path, *overrides: str) -> Monitors:
    watched = ["reward.metrics={text_accuracy: 1.0}", "reward.monitors.metrics=[structure]", "evaluation.enabled=true"]
    return monitors(tmp_path, *watched, *overrides)


def test_a_held_out_metric_may_not_fall_while_the_trained_score_rises(tmp_path):
    watch = held_out(tmp_path)
    before = evaluation(0.5, 0.8, 0)
    watch.after_evaluation(10, before, evaluation(0.6, 0.78, 0), None)
    watch.after_evaluation(20, before, evaluation(0.4, 0.7, 0), None)  # both fall: no hacking
    assert list(watch.take_messages()) == []
    watch.after_evaluation(30, before, evaluation(0.6, 0.7, 0), None)
    (message,) = watch.take_messages()
    assert message.startswith(
        "monitor structure (not trained on): 0.7 at step 30 from 0.8 at the start (-0.1, allowed -0.05)"
    )


def test_pictures_far_from_those_of_the_start_are_noticed(tmp_path):
    watch = held_out(tmp_path, "reward.monitors.picture_change=0.3")
    before = evaluation(0.5, 0.8, 0)
    figures = watch.after_evaluation(10, before, evaluation(0.5, 0.8, 0), None)
    assert figures == {"monitor/picture_change": pytest.approx(0, abs=1e-9)}
    figures = watch.after_evaluation(20, before, evaluation(0.5, 0.8, 1), None)
    (message,) = watch.take_messages()
    assert figures["monitor/picture_change"] > 0.3 and "draws other pictures" in message


def test_edits_that_leave_their_sources_are_noticed(tmp_path):
    watch = held_out(tmp_path, "reward.monitors.picture_change=null")
    before = evaluation(0.5, 0.8, 0)
    figures = watch.after_evaluation(0, before, before, before.images)
    assert figures == {"monitor/source_similarity": pytest.approx(1)}
    figures = watch.after_evaluation(10, before, evaluation(0.5, 0.8, 1), before.images)
    assert figures["monitor/source_similarity"] < 0.7
    (message,) = watch.take_messages()
    assert message.startswith("monitor source_similarity") and "follow their sources less" in message


def test_every_limit_has_its_key(tmp_path):
    assert {text[0] for text in TEXTS.values()} == set(MonitorsConfig.model_fields) - {"action", "window", "metrics"}
    every = settings_of(dit_kl=1.0)
    assert limits_of(every).keys() == TEXTS.keys()
    for limit in limits_of(every).values():
        assert limit.limit == getattr(every, limit.key)


def test_the_run_scores_and_draws_what_the_monitors_need(tmp_path):
    data = f"{tmp_path}/data"
    trainer = trainer_of(
        tmp_path,
        "evaluation.enabled=true",
        "logging.log_images=true",
        "reward.monitors.metrics=[text_accuracy]",
        f"evaluation.eval_source_images_dir={data}/source_images",
        f"evaluation.eval_target_images_dir={data}/target_images",
        f"evaluation.eval_prompts_file={data}/prompts.txt",
        "model.component=dit",
        "training.max_steps=1",
        mode="i2i",
    )
    trainer.train()
    run = tmp_path / "run"
    assert len(figures_of(tmp_path, "eval/text_accuracy")) == 2
    assert figures_of(tmp_path, "monitor/picture_change")[0] > 0
    assert len(figures_of(tmp_path, "monitor/source_similarity")) == 2
    for name in ("brightness", "saturation", "clipped", "edges", "diversity"):
        assert len(figures_of(tmp_path, f"monitor/{name}")) == 1
    assert (run / "samples" / "step-000000" / "grid.png").is_file()
    assert (run / "samples" / "step-000001" / "grid.png").is_file()


def test_a_held_out_metric_without_anything_to_score_is_refused_before_training(tmp_path, capsys):
    from glm_training.cli.validate import validate
    from tests.runs import write_config

    path, prompts = str(write_config(tmp_path)), tmp_path / "plain.txt"
    prompts.write_text("a dog\na cat\n")
    watched = ["reward.monitors.metrics=[text_accuracy]", "evaluation.enabled=true"]
    assert validate([path], watched, None) == 0
    targets = [f"{key}={prompts}" for key in ("data.prompts_file",)] + ["data.target_images_dir=null"]
    own = ["reward.metrics=null", "reward.weights={structure: 1.0}", f"reward.calculator={tmp_path}/hack.py:Brightness"]
    (tmp_path / "hack.py").write_text(BRIGHTNESS)
    assert validate([path], [*watched, *targets, *own], None) == 2
    assert "text_accuracy can score none of the training prompts" in capsys.readouterr().err
