"""Hooks of mkdocs: README.md is the front page, and what the pages link to outside of docs/ is a part of the site.

On GitHub the links are read as they stand. Here Markdown files become pages and others (configurations, code, results)
are copied, below `repository/`, so that the site needs no address of a repository and shows one revision of everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FRONT = "README.md"
BESIDE = ("QUICKSTART.md", "examples/USAGE.md", "examples/cluster/README.md", "data/README.md", "CONTRIBUTING.md")
PAGES = (FRONT, *BESIDE, "CHANGELOG.md")
LINK = re.compile(r"(\]\()((?!\w+:|#|/)[^)#\s]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)


def place(path: PurePosixPath) -> str:
    """Where a file of the repository lies among the site's sources."""
    if path.as_posix() == FRONT:
        return "index.md"
    if path.parts[0] == "docs":
        return path.relative_to("docs").as_posix()
    return f"repository/{path.as_posix()}"


def source(src_uri: str) -> PurePosixPath:
    """The file of the repository that a source of the site is."""
    if src_uri == "index.md":
        return PurePosixPath(FRONT)
    path = PurePosixPath(src_uri)
    return path.relative_to("repository") if path.parts[0] == "repository" else "docs" / path


def target(page: PurePosixPath, link: str) -> PurePosixPath:
    """What a link of a page means, from the root of the repository."""
    return PurePosixPath(os.path.normpath(page.parent / link).replace(os.sep, "/"))


def with_links(text: str, change: Callable[[str], str]) -> str:
    """Markdown with its relative links changed, those in code left alone."""
    parts = CODE.split(text)
    for number in range(0, len(parts), 2):
        parts[number] = LINK.sub(lambda match: match[1] + change(match[2]) + match[3], parts[number])
    return "".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages beside docs/, and what any page links to that is not in docs/."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    wanted = {PurePosixPath(path) for path in PAGES}
    for path in map(PurePosixPath, pages):

        def note(link: str, path: PurePosixPath = path) -> str:
            found = target(path, link)
            if found.parts[0] != "docs" and (ROOT / found).is_file():  # else mkdocs tells that it leads nowhere
                wanted.add(found)
            return link

        with_links((ROOT / path).read_text(encoding="utf-8"), note)
    for path in sorted(wanted):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links as they are among the site's sources."""
    here = source(page.file.src_uri)

    def moved(link: str) -> str:
        return os.path.relpath(place(target(here, link)), PurePosixPath(page.file.src_uri).parent).replace(os.sep, "/")

    return with_links(markdown, moved)
