"""The page in a real browser: no errors, no requests; slider, filters and charts by mouse and keyboard; the dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_training.report.comparison import compare
from glm_training.report.page import page
from glm_training.report.run import read_runs
from tests.browser import Browser, found
from tests.report_runs import write_large_run, write_run

pytestmark = pytest.mark.skipif(
    found() is None, reason="there is no Chromium here: install one (apt-get install chromium) or name it in CHROMIUM"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pages of a long run, of two runs, and of one with hostile texts."""
    root = tmp_path_factory.mktemp("pages")
    large = write_large_run(root / "large", size=96)
    small = write_large_run(root / "small", steps=20, pictures=40, size=32)
    hostile = '</script><script>document.title="caught"</script><img src=x onerror="document.title=\'caught\'">'
    figures = [{"step": 1, f"reward/{hostile}": 0.5}, {"step": 2, "ar/kl": None}]
    scores = {0: {"total": [0.1, 0.2]}, 1: {"total": [0.1, None]}}
    bad = write_run(root / "bad", scores, prompts=[hostile, hostile + "2"], figures=figures)
    for name, folders in {"large": [large], "small": [small], "both": [small, large], "bad": [bad]}.items():
        runs = read_runs(folders)
        html = page(runs, compare(runs) if len(runs) > 1 else None)
        (root / f"{name}.html").write_text(html, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = found()
    assert program is not None
    window = Browser(program, tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


def set_to(browser: Browser, name: str, value: object) -> None:
    """As a person does: the value, then the event that the page hears."""
    browser.ask(
        f"(() => {{ const input = document.getElementById({name!r}); input.value = {value!r};"
        "input.dispatchEvent(new Event('input', {bubbles: true})); input.dispatchEvent(new Event('change')); })()"
    )


def text(browser: Browser, name: str) -> str:
    return browser.ask(f"document.getElementById({name!r}).textContent")


def whole(browser: Browser) -> None:
    """Everything was drawn and nothing went wrong, nothing was asked for, nothing sticks out to the side."""
    browser.ask(
        "(async () => { for (const node of document.querySelectorAll('section, .chart')) {"
        "node.scrollIntoView({behavior: 'instant'}); await new Promise(requestAnimationFrame); } })()"
    )
    browser.until("charts.every((chart) => chart.ready)")
    browser.until("[...document.querySelectorAll('.chart svg')].every((each) => each.childElementCount > 0)")
    assert browser.faults == []
    others = [each for each in browser.requests if not each.startswith("data:image/jpeg;base64,")]
    assert set(others) <= {browser.address, "about:blank"}
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("name", ["small", "both", "bad"])
def test_a_page_is_whole(folder, browser, name, width, dark):
    browser.open(folder / f"{name}.html", width=width, dark=dark)
    whole(browser)
    colour = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) is dark
    assert browser.ask("document.title") != "caught"


def test_a_narrow_window_shows_what_a_row_comes_to(folder, browser):
    browser.open(folder / "large.html", width=400)
    whole(browser)
    assert browser.ask("[...document.querySelectorAll('.acts button')].every((each) => each.offsetHeight < 30)")
    right = "(row, column) => document.querySelector(row).cells[column].getBoundingClientRect().right"
    assert browser.ask(f"({right})('#prompts tr', 3) <= innerWidth")
    assert browser.ask(f"({right})('.monitors tr', 4) <= innerWidth")


def test_a_long_run_opens_at_once(folder, browser):
    assert (folder / "large.html").stat().st_size < 30e6
    browser.open(folder / "large.html")
    assert browser.seconds() < 2
    assert browser.ask("document.querySelectorAll('#strip img').length") == 12  # six prompts, first and last
    whole(browser)


def test_the_slider_of_samples_moves_with_the_keyboard(folder, browser):
    browser.open(folder / "small.html")
    browser.near("samples")
    browser.until("document.querySelectorAll('#samples-grid img').length > 0")
    assert text(browser, "samples-at") == "step 20 of 20"
    before = browser.ask("document.querySelector('#samples-grid .pair').lastChild.querySelector('img').src")
    browser.ask("document.getElementById('samples-step').focus()")
    browser.key("ArrowLeft")
    browser.until("document.getElementById('samples-at').textContent === 'step 13 of 20'")
    assert browser.ask("document.querySelector('#samples-grid .pair').lastChild.querySelector('img').src") != before
    browser.key("Home")
    browser.until("document.getElementById('samples-at').textContent === 'step 0 of 20'")
    set_to(browser, "samples-find", "word 3")
    assert browser.ask("document.querySelectorAll('#samples-grid .tile').length") == 1
    set_to(browser, "samples-find", "no such word")
    assert "No prompt" in text(browser, "samples-grid")


def test_rollouts_are_filtered_ordered_and_enlarged(folder, browser):
    browser.open(folder / "small.html")
    browser.near("rollouts")
    browser.until("document.querySelectorAll('#rollouts-list .prompt').length === 4")
    assert browser.ask("document.querySelectorAll('#rollouts-list .render').length") == 4 * 3 * 4
    assert browser.ask("document.querySelectorAll('#rollouts-list .best').length") == 4
    set_to(browser, "rollouts-show", "ends")
    assert browser.ask("document.querySelectorAll('#rollouts-list .render').length") == 8
    set_to(browser, "rollouts-order", "best")
    lines = browser.ask("[...document.querySelectorAll('#rollouts-list .prompt > .quiet')].map((e) => e.textContent)")
    means = [float(re.search(r"mean ([0-9.]+)", line)[1]) for line in lines]
    assert means == sorted(means, reverse=True)
    set_to(browser, "rollouts-figure", "objects")
    assert "objects: mean" in text(browser, "rollouts-list")
    set_to(browser, "rollouts-step", 0)
    assert text(browser, "rollouts-at") == "step 1 of 20"
    browser.ask("document.querySelector('#rollouts-list .shot').click()")
    assert browser.ask("document.getElementById('large').open")
    browser.key("Escape")
    browser.until("!document.getElementById('large').open")


def test_charts_are_found_switched_and_read_by_keyboard(folder, browser):
    browser.open(folder / "small.html")
    browser.until("charts.find((chart) => chart.spec.key === 'total').ready")
    browser.ask("charts.find((chart) => chart.spec.key === 'total').svg.focus()")
    browser.key("End")
    tip = "charts.find((chart) => chart.spec.key === 'total').tip"
    assert browser.ask(f"{tip}.hidden") is False and browser.ask(f"{tip}.textContent").startswith("step 20")
    browser.key("ArrowLeft")
    assert browser.ask(f"{tip}.textContent").startswith("step 19")
    paths = "charts.find((chart) => chart.spec.key === 'total').svg.querySelectorAll('path').length"
    before = browser.ask(paths)
    browser.ask("charts.find((chart) => chart.spec.key === 'total').legend.querySelector('button').click()")
    assert browser.ask(paths) < before
    set_to(browser, "find", "kl ar")
    assert browser.ask("charts.filter((chart) => !chart.node.hidden).map((chart) => chart.spec.key)") == [
        "ar/approx_kl",
        "ar/kl",
    ]


def test_prompts_settings_and_theme(folder, browser):
    browser.open(folder / "both.html")
    browser.near("prompts")
    browser.until("document.querySelectorAll('#prompts-rows tr').length === 64")
    set_to(browser, "prompts-order", "low")
    lows = browser.ask("[...document.querySelectorAll('#prompts-rows tr')].map((row) => +row.children[2].textContent)")
    assert lows == sorted(lows)
    set_to(browser, "settings-find", "brightness")
    assert browser.ask("[...document.querySelectorAll('details.keys tr')].filter((row) => !row.hidden).length") == 1
    set_to(browser, "theme", "dark")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 18)"


def test_a_script_in_a_text_would_not_run_even_where_it_stood(folder, browser):
    html = (folder / "small.html").read_text(encoding="utf-8")
    planted = folder / "planted.html"
    planted.write_text(html.replace("</main>", '<script>document.title = "caught"</script></main>'), encoding="utf-8")
    browser.open(planted)
    assert browser.ask("document.title") == "small"
    assert any("Content Security Policy" in fault for fault in browser.faults)
