"""What the page says is what the run's files say; it asks for nothing, runs nothing of theirs, and stays small."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from glm_training.report import page as module
from glm_training.report import pictures
from glm_training.report.charts import MAX_POINTS, brought_together, placed
from glm_training.report.comparison import compare
from glm_training.report.monitors import watched
from glm_training.report.page import page, write_page
from glm_training.report.run import ReportError, read_run, read_runs
from glm_training.utils.kept_rollouts import KeptRollout, RolloutFolder
from tests.report_runs import picture, write_large_run, write_lines, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \"' & {{ 7 * 7 }} \u2028 \x00 \ud800"


class Parsed(HTMLParser):
    """Elements with their attributes, the text that is seen, and the contents of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, text):
        if self._in == "script":
            self.scripts.append(text)
        elif self._in != "style":
            self.words.append(text)

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def text(self):
        return " ".join(self.words)


def made(*folders) -> Parsed:
    runs = read_runs(folders)
    return Parsed(page(runs, compare(runs) if len(runs) > 1 else None))


def lines_of(data, tag: str):
    found = [line for section in data["sections"] for chart in section["charts"] for line in chart["lines"]]
    return [(data["steps"][line["steps"]], line["values"], line) for line in found if line["tag"] == tag]


def test_every_figure_of_the_log_is_on_the_page_once_with_its_values(tmp_path):
    figures = [
        {
            "step": step,
            "reward/total": 0.1 * step,
            "ar/kl": 0.123456789 / step,
            "odd_one": None,
            "time/step_seconds": 2.0,
        }
        for step in (1, 2, 3)
    ]
    data = made(
        write_run(tmp_path / "a", {3: {"total": [0.2, 0.4]}}, figures=[*figures, {"step": 3, "eval/total": 0.3}])
    ).data
    for tag in ("reward/total", "ar/kl", "odd_one"):
        ((steps, values, _),) = lines_of(data, tag)
        assert steps == [1, 2, 3]
        expected = [line[tag] for line in figures]
        assert values == (expected if None in expected else pytest.approx(expected, rel=1e-6))
    ((steps, values, line),) = lines_of(data, "eval/total")
    # 0.2, 0.4: mean 0.3, standard error 0.1, t(1) = 12.7062
    assert (steps, values) == ([3], [0.3])
    assert line["low"] == pytest.approx([0.3 - 1.27062], abs=1e-4) and line["high"] == pytest.approx(
        [0.3 + 1.27062], abs=1e-4
    )


def test_training_and_held_out_share_a_chart(tmp_path):
    assert placed("reward/objects")[1].key == placed("eval/objects")[1].key
    roles = [placed(tag)[2] for tag in ("reward/objects", "eval/objects", "dit/loss", "eval/dit/loss")]
    assert roles == ["training", "held-out"] * 2
    assert placed("dit/loss")[:2] == placed("eval/dit/loss")[:2]
    assert [placed(tag)[0] for tag in ("ar/kl", "ar/clip_fraction", "x/y", "monitor/edges", "gap/total")] == [
        "kl", "clip", "other", "monitors", "gap",
    ]  # fmt: skip


def test_hostile_texts_stay_texts(tmp_path):
    folder = write_run(
        tmp_path / "a", {0: {"total": [0.1, 0.2]}, 1: {"total": [0.3, 0.4]}}, prompts=[HOSTILE, HOSTILE + "2"],
        figures=[{"step": 1, f"reward/{HOSTILE}": 0.5}],
        data__prompts_file=HOSTILE.replace("\x00", "").replace("\ud800", ""),
    )  # fmt: skip
    (folder / "train.log").write_text(
        f"2026-01-01 10:00:00,123 WARNING a.b: {HOSTILE}\n", encoding="utf-8", errors="backslashreplace"
    )
    write_lines(folder / "sessions.jsonl", [{"step": 0, "command": HOSTILE, "packages": HOSTILE, HOSTILE: 1}])
    kept = KeptRollout(1, 1, [HOSTILE], 1, 1, {HOSTILE: [0.5]}, [], [0.1])
    RolloutFolder(folder / "rollouts", 1 << 20).write(kept, [picture(16, 0, 0)])
    parsed = made(folder)
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == 3 and "img" not in tags
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert parsed.data["rollouts"][0]["steps"][0]["prompts"][0].startswith(HOSTILE[:60])
    assert "49" not in parsed.text.split("a finished")[0][:200]


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(tmp_path):
    html = page(read_runs([write_run(tmp_path / "a", {1: {"total": [0.5]}})]), None)
    parsed = Parsed(html)
    policy = next(a["content"] for tag, a in parsed.elements if tag == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[-1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not [a for tag, a in parsed.elements if tag in ("link", "iframe", "object", "base") or "src" in a]
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html and "url(" not in html


def test_secrets_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "very-secret-value-1")
    folder = write_run(
        tmp_path / "a", {1: {"total": [0.5]}}, prompts=["a sign with very-secret-value-1"], x__y="very-secret-value-1"
    )
    assert "very-secret-value-1" not in page(read_runs([folder]), None)


@pytest.mark.parametrize("missing", ["evaluations.jsonl", "metrics.jsonl", "config.yaml", "all but metrics"])
def test_a_run_that_lacks_something_has_a_page(tmp_path, missing):
    folder = write_large_run(tmp_path / "a", steps=20, pictures=20, size=32)
    if missing == "all but metrics":
        for path in folder.iterdir():
            if path.name != "metrics.jsonl":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        (folder / missing).unlink()
    assert "Nothing on this page comes from elsewhere" in made(folder).text


def test_a_run_that_has_just_begun_and_one_of_a_single_step(tmp_path):
    folder = write_run(tmp_path / "a", figures=[{"step": 1, "reward/total": None, "nonfinite": ["reward/total"]}])
    ((steps, values, _),) = lines_of(made(folder).data, "reward/total")
    assert (steps, values) == ([1], [None])
    (folder / "metrics.jsonl").write_text("")
    assert made(folder).data["sections"] == []


def test_pictures_that_are_none_leave_a_gap(tmp_path):
    folder = write_large_run(tmp_path / "a", steps=20, pictures=20, size=32)
    broken = sorted(folder.glob("samples/*/0.png"))[0]
    broken.write_bytes(b"no picture")
    (sorted(folder.glob("rollouts/*/0-0-0.jpg"))[0]).write_bytes(b"\xff\xd8\xff")
    (sorted(folder.glob("rollouts/*/rollout.json"))[-1]).write_text("{")
    parsed = made(folder)
    assert parsed.data["samples"][0]["steps"][0]["pictures"][0] == -1
    assert parsed.data["rollouts"][0]["steps"][0]["pictures"][0] == -1
    assert len(parsed.data["rollouts"][0]["steps"]) == 2 and "rollouts:" in parsed.text


def test_the_pictures_are_those_of_the_steps(tmp_path):
    folder = write_large_run(tmp_path / "a", steps=20, pictures=20, size=64)
    parsed = made(folder)
    album = json.loads(parsed.scripts[1])
    steps = parsed.data["samples"][0]["steps"]
    assert [each["step"] for each in steps] == [0, 20]
    for each in steps:
        for i, place in enumerate(each["pictures"]):
            shown = Image.open(io.BytesIO(base64.b64decode(album[place])))
            kept = Image.open(folder / "samples" / f"step-{each['step']:06d}" / f"{i}.png")
            assert shown.size == kept.size and shown.getpixel((32, 32)) == pytest.approx(
                kept.getpixel((32, 32)), abs=40
            )
    kept = parsed.data["rollouts"][0]["steps"][-1]
    name = KeptRollout.read(folder / "rollouts" / "step-000020").names[5]
    assert base64.b64decode(album[kept["pictures"][5]]) == (folder / "rollouts" / "step-000020" / name).read_bytes()


def test_long_runs_are_brought_together_and_long_texts_cut(tmp_path):
    count = MAX_POINTS * 2 + 1
    figures = [{"step": step, "x": float(step)} for step in range(1, count + 1)]
    prompts = [f"{i} " + "x" * 5000 for i in range(500)]
    folder = write_run(tmp_path / "a", {count: {"total": [0.5] * 500}}, figures=figures, prompts=prompts)
    parsed = made(folder)
    ((steps, values, line),) = lines_of(parsed.data, "x")
    assert line["each"] == 3 and len(steps) == len(values) <= MAX_POINTS
    assert (steps[:2], values[:2], steps[-1], values[-1]) == ([3, 6], [2.0, 5.0], count, (count - 1 + count) / 2)
    own = parsed.data["prompts"][0]
    assert own["of"] == 500 and len(own["prompts"]) == 200
    assert all(len(prompt) == module.MAX_TEXT + 1 and prompt.endswith("…") for prompt in own["prompts"])


def test_neighbours_are_brought_together():
    assert brought_together([1.0, 3.0, None, None, 5.0], 2) == [2.0, None, 5.0]


def test_pictures_are_thinned_evenly_within_their_bounds():
    assert pictures.spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert pictures.spread([1, 2], 5) == [1, 2] and pictures.spread([1, 2], 1) == [2] and pictures.spread([1], 0) == []
    assert pictures.within([1] * 100, lambda _: 10, 45) == [1] * 4


def test_what_is_not_shown_is_told(tmp_path, monkeypatch):
    folder = write_large_run(tmp_path / "a", steps=20, pictures=100, size=16)
    monkeypatch.setattr(pictures, "SAMPLES", 40)
    monkeypatch.setattr(pictures, "PROMPTS", 8)
    taken = [path.stat().st_size for path in (folder / "rollouts" / "step-000001").glob("*.jpg")]
    monkeypatch.setattr(pictures, "ROLLOUT_BYTES", int(2.5 * sum(taken)))
    data = made(folder).data
    assert data["samples"][0]["told"].startswith("Shown: 5 of 10 steps and the first 8 of 10 prompts")
    assert [each["step"] for each in data["samples"][0]["steps"]][:: len(data["samples"][0]["steps"]) - 1] == [0, 20]
    assert data["rollouts"][0]["told"].startswith("Shown: 2 of 3 kept steps")


def test_two_thousand_steps_and_two_hundred_pictures_are_a_small_page(tmp_path):
    html = page(read_runs([write_large_run(tmp_path / "a", size=128)]), None)
    assert len(html.encode()) < 30e6
    data = Parsed(html).data
    assert sum(len(each["pictures"]) for each in data["samples"][0]["steps"]) == 200
    assert len(lines_of(data, "reward/total")[0][1]) == 2000


def test_monitors_stand_where_the_limits_say(tmp_path):
    figures = [{"step": step, "monitor/brightness": 0.6 + 0.02 * step, "ar/kl": 0.25} for step in range(11)]
    folder = write_run(
        tmp_path / "a", figures=figures, logging__log_interval=1,
        reward__monitors={"window": 2, "brightness_change": 0.4, "ar_kl": 0.5, "new": 1},
    )  # fmt: skip
    (folder / "train.log").write_text("2026-01-01 10:00:00,123 INFO a.b: warning: monitor brightness: 0.79 at step 9\n")
    found = {one.name: one for one in watched(read_run(folder))}
    # start 0.61, now 0.79: 0.18 of 0.39 to white is 46 % of the way, of 40 % allowed
    brightness = found["brightness"]
    assert (brightness.start, brightness.now) == pytest.approx((0.61, 0.79))
    assert brightness.used == pytest.approx(0.18 / 0.39 / 0.4)
    assert (brightness.low, brightness.high) == pytest.approx((0.61 - 0.4 * 0.39, 0.61 + 0.4 * 0.39))
    assert brightness.tripped == ["monitor brightness: 0.79 at step 9"]
    assert found["ar kl"].used == pytest.approx(0.5) and found["ar kl"].high == 0.5
    assert "over its limit" in made(folder).text


def test_settings_and_their_difference(tmp_path):
    one = write_run(tmp_path / "a", {1: {"total": [0.5]}}, training__learning_rate=1e-4, model__name="tiny")
    two = write_run(tmp_path / "b", {1: {"total": [0.5]}}, training__learning_rate=2e-4, model__name="tiny")
    text = made(one, two).text
    differ = text[text.index("What differs") : text.index("Find a key")]
    assert "training.learning_rate" in differ and "0.0001" in differ and "model.name" not in differ


def test_a_file_that_is_no_page_is_not_written_over(tmp_path):
    path = tmp_path / "report.html"
    html = page(read_runs([write_run(tmp_path / "a", {1: {"total": [0.5]}})]), None)
    path.write_text("mine")
    with pytest.raises(ReportError, match="--out"):
        write_page(path, html)
    path.unlink()
    write_page(path, html)
    write_page(path, html)
    assert list(tmp_path.glob("*.new")) == []
    with pytest.raises(ReportError, match="cannot be written"):
        write_page(tmp_path / "no" / "folder.html", html)


def test_more_runs_than_a_page_has_room_for(tmp_path):
    folder = write_run(tmp_path / "a", {1: {"total": [0.5]}})
    runs = read_runs([folder] * 9)
    with pytest.raises(ReportError, match="room for 8 runs"):
        page(runs, compare(runs))
