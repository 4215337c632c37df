"""The documentation builds as a site without a warning, and nothing of it is lost on the way."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason='mkdocs-material is not here: pip install -e ".[docs]"'
)


def build(folder: Path, *, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(folder)]
    return subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def article(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]


def page_of(site: Path, path: Path) -> Path:
    """The page of a Markdown file."""
    below = (
        path.relative_to(ROOT / "docs")
        if path.is_relative_to(ROOT / "docs")
        else Path("repository", path.relative_to(ROOT))
    )
    return site / (below.with_suffix("") if path.name != "README.md" else below.parent) / "index.html"


def test_each_table_and_list_is_one_on_the_site(site: Path) -> None:
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert len(pages) > 20
    for path in pages:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        shown = article(page_of(site, path))
        assert shown.count("<table>") == len(re.findall(r"^\|(?: *:?-+:? *\|)+$", text, flags=re.MULTILINE)), path
        items = re.findall(r"^(?:-|\d+\.) ", text, flags=re.MULTILINE)
        assert shown.count("<li>") == len(items), path


def test_links_of_the_site_lead_to_its_own_files(site: Path) -> None:
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^"#?]+)', article(page)):
            if not re.match(r"\w+:", link):
                target = (page.parent / unquote(link)).resolve()
                assert target.exists() and target.is_relative_to(site.resolve()), (page, link)
                checked += 1
    assert checked > 100


def test_what_is_linked_outside_of_docs_is_on_the_site_as_it_is_here(site: Path) -> None:
    results = "benchmarks/results/sharding.json"
    assert f'href="../repository/{results}"' in article(site / "distributed" / "index.html")
    assert (site / "repository" / results).read_bytes() == (ROOT / results).read_bytes()
    assert "Post-train" in article(site / "index.html")


@pytest.mark.parametrize("link", ["../configs/absent.yaml", "absent.md", "rewards.md#absent"])
def test_a_link_that_leads_nowhere_ends_the_build(link: str, tmp_path: Path) -> None:
    for name in (".ci", "docs", "examples", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "data" / "README.md", ROOT / "mkdocs.yml"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    with (tmp_path / "docs" / "doctor.md").open("a") as file:
        file.write(f"[x]({link})\n")
    done = build(tmp_path / "site", config=tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "doctor.md" in warning and "absent" in warning
