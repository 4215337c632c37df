"""Places and names that the page on the architecture gives are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LAYERS = {path.name for path in (ROOT / "glm_training").iterdir() if path.is_dir()}
PLACE = re.compile(r"`((?:glm_training/)?(?:" + "|".join(sorted(LAYERS)) + r")/[\w./-]*)`")


def missing(text: str) -> list[str]:
    """Places of the package that are not there."""
    return [
        one
        for one in PLACE.findall(text)
        if not ((ROOT / "glm_training" / _below(one)).exists() or (ROOT / one).exists())
    ]


def unknown(text: str) -> list[str]:
    """Names in brackets behind a file, `a/b.py` (`NAME`, `OTHER`), that do not stand in it."""
    found = []
    for place, names in re.findall(PLACE.pattern + r" \(((?:`\w+`(?:, )?)+)\)", text):
        path = ROOT / "glm_training" / _below(place)
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        found += [f"{place} ({name})" for name in re.findall(r"\w+", names) if not re.search(rf"\b{name}\b", source)]
    return found


def _below(place: str) -> str:
    return place.removeprefix("glm_training/")


def test_places_are_there() -> None:
    assert len(PLACE.findall(TEXT)) > 60
    assert missing(TEXT) == []
    assert missing("`rewards/clip.py`, `rewards/clap.py`") == ["rewards/clap.py"]


def test_names_stand_in_the_files_before_them() -> None:
    assert unknown(TEXT) == []
    wrong = "`engine/families.py` (`FAMILIES`), `preference/pair_families.py` (`PAIRS`, `ENCODERS`)"
    assert unknown(wrong) == ["preference/pair_families.py (ENCODERS)"]


def test_each_method_and_trainer_is_in_the_table_of_losses() -> None:
    for layer, helpers in (("methods", {"losses"}), ("trainers", {"base_trainer", "encoding_trainer", "dmdr_outputs"})):
        for path in (ROOT / "glm_training" / layer).glob("*.py"):
            if path.stem not in helpers | {"__init__"}:
                assert f"`{layer}/{path.name}`" in TEXT, path
