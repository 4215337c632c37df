"""The captions that the tiny model ends on: wrong as often as stated, and never a combination that is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests import small_world  # noqa: F401  # the examples' folder on the path

from data import MISTAKES, caption, edits, instruction  # isort: skip
from checker import parse  # isort: skip
from world import COLORS, RELATIONS, Scene, all_scenes, is_held_out  # isort: skip

COUNT = 6000


def expected(scene: Scene) -> float:
    """The chance that the caption has another first colour: what would name a held-out combination is put right."""
    chance, colors = 0.0, list(COLORS)
    turned = replace(scene, color=colors[(colors.index(scene.color) + 1) % len(colors)])
    for relation in RELATIONS:
        same = relation == scene.relation
        if not is_held_out(replace(turned, relation=relation)):
            chance += MISTAKES["color"] * (1 - MISTAKES["relation"] if same else MISTAKES["relation"])
    return chance


def test_captions_name_the_next_color_as_often_as_stated():
    rng, shown = np.random.default_rng(0), all_scenes(False)["relation"]
    scenes = [shown[i] for i in rng.integers(len(shown), size=COUNT)]
    written = [parse(caption(scene, rng)) for scene in scenes]
    assert all((a.shape, a.other_shape) == (b.shape, b.other_shape) for a, b in zip(scenes, written, strict=True))
    wrong = sum(a.color != b.color for a, b in zip(scenes, written, strict=True)) / COUNT
    assert wrong == pytest.approx(sum(map(expected, scenes)) / COUNT, abs=4 * 0.5 / COUNT**0.5)


@pytest.mark.parametrize("kind", ["sign", "relation", "count"])
def test_a_caption_of_a_held_out_combination_is_never_written(kind):
    rng = np.random.default_rng(1)
    for scene in all_scenes(False)[kind]:
        for _ in range(3):
            assert not is_held_out(parse(caption(scene, rng)))


def test_a_mistaken_instruction_asks_for_another_new_color_or_word():
    rng, found = np.random.default_rng(2), edits(400, 3).edits
    texts = [instruction(edit, rng) for edit in found]
    assert all(a.instruction.rsplit(" ", 1)[0] == text.rsplit(" ", 1)[0] for a, text in zip(found, texts, strict=True))
    wrong = sum(edit.instruction != text for edit, text in zip(found, texts, strict=True)) / len(found)
    assert 0.2 < wrong < 0.5
