"""The mutations still fit the code that they are of; whether they are noticed takes an hour (CONTRIBUTING.md)."""

from __future__ import annotations

from collections import Counter

from tests.mutants.catalogue import ROOT, misfit, mutations


def test_every_mutation_fits_the_tree_once() -> None:
    stale = [f"{mutation}: {why}" for mutation in mutations() if (why := misfit(mutation)) is not None]
    assert not stale, "\n".join(stale)


def test_mutations_are_distinct_and_of_every_package() -> None:
    every = mutations()
    assert max(Counter((mutation.file, mutation.old, mutation.new) for mutation in every).values()) == 1
    assert max(Counter(map(str, every)).values()) == 1, "they are told apart by what they break"
    packages = {path.parent.name for path in (ROOT / "glm_training").glob("*/__init__.py")}
    assert packages >= {mutation.file.split("/")[0] for mutation in every}
