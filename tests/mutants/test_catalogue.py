"""The mutations still fit the code that they are of; whether they are noticed takes an hour (CONTRIBUTING.md)."""

from __future__ import annotations

from collections import Counter

from tests.mutants.catalogue import ROOT, mutations


def test_every_mutation_fits_the_tree_once() -> None:
    stale = []
    for mutation in mutations():
        try:
            mutation.applied()
        except (ValueError, SyntaxError) as error:
            stale.append(f"{mutation}: {error}")
        named = [name.split("::")[0] for name in mutation.tests]
        stale += [f"{mutation}: {name} is gone" for name in named if not (ROOT / name).exists()]
    assert not stale, "\n".join(stale)


def test_mutations_are_distinct_and_of_every_package() -> None:
    every = mutations()
    assert max(Counter((mutation.file, mutation.old, mutation.new) for mutation in every).values()) == 1
    assert max(Counter(map(str, every)).values()) == 1, "they are told apart by what they break"
    packages = {path.parent.name for path in (ROOT / "glm_training").glob("*/__init__.py")}
    assert packages >= {mutation.file.split("/")[0] for mutation in every}
