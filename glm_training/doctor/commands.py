"""Commands that mend, as a user types them here: with this Python, this installation and these rights."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import glm_training

ROOT = Path(glm_training.__file__).resolve().parents[1]
"""Where the package lies: a clone, or the folder that pip installs into."""


@dataclass(frozen=True)
class Asked:
    """The configuration that is asked about; without files, the machine alone."""

    paths: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    mode: str | None = None

    def words(self) -> list[str]:
        """As they stand on the command line, quoted."""
        mode = [] if self.mode is None else ["--mode", self.mode]
        files = [word for path in self.paths for word in ("--config", path)]
        return [shlex.quote(word) for word in (*files, *mode, *self.overrides)]


def is_clone() -> bool:
    """Whether the package is used from its repository."""
    return (ROOT / "pyproject.toml").is_file()


def python() -> str:
    """What starts this Python: `python` where that is the one, else its path."""
    found = shutil.which("python")
    same = found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()
    return "python" if same else shlex.quote(sys.executable)


def pip_install(*requirements: str, place: Path | None = None, options: Sequence[str] = ()) -> list[str]:
    """Installs `requirements`. `place`: the folder that the present version of the one is imported from, which stands
    before the environment's own where PYTHONPATH names it: there alone an upgrade shows."""
    where: list[str] = []
    if place is not None and not _is_environment(place):
        user = place.resolve() == Path(site.getusersitepackages()).resolve()
        where = ["--user"] if user else ["--upgrade", "--target", shlex.quote(str(place))]
    return [python(), "-m", "pip", "install", *where, *options, *map(shlex.quote, requirements)]


def _is_environment(place: Path) -> bool:
    return place.resolve() in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}


def reinstall() -> list[str]:
    """The package with its libraries, anew."""
    own = ["-e", str(ROOT)] if is_clone() else [_origin()]
    return pip_install(*own, options=["--force-reinstall"])


def _origin() -> str:
    """What pip installed the package from, as it noted it (PEP 610): a folder or an address; the name, of an index."""
    try:
        noted = distribution("glm_training").read_text("direct_url.json")
    except PackageNotFoundError:
        noted = None
    if noted is None:
        return "glm_training"
    found = json.loads(noted)
    url: str = found["url"]
    if vcs := found.get("vcs_info"):
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return url2pathname(urlsplit(url).path) if url.startswith("file:") else url


def apt_install(*packages: str) -> list[str]:
    """Packages of Debian and Ubuntu; a container's lists of them may be empty, so they are fetched first."""
    rights = [] if not hasattr(os, "geteuid") or os.geteuid() == 0 else ["sudo"]
    return [*rights, "apt-get", "update", "&&", *rights, "apt-get", "install", "-y", *map(shlex.quote, packages)]


def glm_train(command: str, asked: Asked, *more: str, changes: Mapping[str, str] | None = None) -> list[str]:
    """A command of this program over the same configuration, with `more` words after it and `changes` to the
    environment."""
    found = shutil.which("glm-train")
    ours = found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()
    program = ["glm-train"] if ours else [python(), "-m", "glm_training.cli.main"]
    before = [f"{name}={shlex.quote(value)}" for name, value in (changes or {}).items()]
    return [*before, *program, command, *asked.words(), *map(shlex.quote, more)]


def export(name: str, value: str) -> list[str]:
    """Sets a variable of the environment for what is started next."""
    return ["export", f"{name}={shlex.quote(value)}"]
