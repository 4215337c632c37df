"""Rows of a DiT's condition, put together, picked and dropped, on numbers that name their row."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.glm_image.conditioning import build_condition, check_sources, check_tokens, drop_rows
from glm_training.models.glm_image.dit_types import DiTCondition, SourceCondition

EMPTY = torch.full((1, 1, 2), 9.0)
"""What "" is encoded to."""


def glyphs(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[P, longest, 2] of the number of the row from 1 on, 0 past its length, and the mask of what is real."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    numbers = torch.arange(1.0, len(lengths) + 1).view(-1, 1, 1)
    return (numbers * mask[..., None]).expand(-1, -1, 2), mask


def sources(count: int) -> SourceCondition:
    numbers = torch.arange(count)
    return SourceCondition(numbers.float().view(-1, 1, 1, 1), numbers[:, None] + 10, (1, 1), numbers)


def condition() -> DiTCondition:
    """Three prompts with 2, 3 and 1 glyph tokens, two plans each, a grid of 1 x 2 tokens."""
    return build_condition(torch.arange(12).view(6, 2), (1, 2), *glyphs(2, 3, 1), sources(3))


def read(condition: DiTCondition) -> list[list[float]]:
    """The glyph tokens of each row that count."""
    pairs = zip(condition.glyph, condition.glyph_mask, strict=True)
    assert bool((condition.glyph[..., 0] == condition.glyph[..., 1]).all())
    return [glyph[mask, 0].tolist() for glyph, mask in pairs]


def test_every_plan_of_a_prompt_has_its_words_and_its_source():
    whole = condition()
    assert read(whole) == [[1, 1], [1, 1], [2, 2, 2], [2, 2, 2], [3], [3]]
    assert whole.source is not None and whole.source.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert (whole.height, whole.width, whole.grid, whole.batch_size) == (32, 64, (1, 2), 6)
    assert whole.dropped is None
    for rows in (7, 2):
        with pytest.raises(ValueError, match="same number of rows for each of 3 prompts"):
            build_condition(torch.zeros(rows, 2, dtype=torch.long), (1, 2), *glyphs(2, 3, 1), None)


@pytest.mark.parametrize("rows", [torch.tensor([5, 0, 4]), torch.tensor([5, 0, 4]).to(torch.int32)])
def test_picked_rows_keep_what_is_theirs_and_glyphs_are_cut_to_the_longest(rows):
    picked = condition().select(rows)
    assert read(picked) == [[3], [1, 1], [3]] and picked.glyph.shape == (3, 2, 2)
    assert picked.prior_tokens.tolist() == [[10, 11], [0, 1], [8, 9]]
    source = picked.source
    assert source is not None and source.rows.tolist() == [1, 0, 1]
    assert source.latents.flatten().tolist() == [0, 2] and source.prior_tokens.tolist() == [[10], [12]]


def test_rows_are_picked_by_a_mask_and_repeated_in_place():
    mask = torch.tensor([False, True, False, False, False, True])
    assert condition().select(mask).prior_tokens.tolist() == [[2, 3], [10, 11]]
    twice = condition().select(torch.tensor([4, 0])).repeat_interleave(2)
    assert read(twice) == [[3], [3], [1, 1], [1, 1]] and twice.prior_tokens[:, 0].tolist() == [8, 8, 0, 0]
    assert twice.source is not None and twice.source.latents[twice.source.rows].flatten().tolist() == [2, 2, 0, 0]


def test_dropped_rows_read_the_empty_text_and_those_dropped_before_stay_so():
    once = drop_rows(condition(), torch.tensor([False, False, True, False, False, False]), EMPTY)
    assert read(once) == [[1, 1], [1, 1], [9], [2, 2, 2], [3], [3]]
    twice = drop_rows(once, torch.tensor([True, False, False, False, False, False]), EMPTY)
    assert read(twice) == [[9], [1, 1], [9], [2, 2, 2], [3], [3]]
    assert twice.dropped is not None and twice.dropped.tolist() == [True, False, True, False, False, False]
    assert twice.prior_tokens.equal(condition().prior_tokens), "the tokens stay, the model is told to pass over them"
    picked = twice.select(torch.tensor([1, 2]))
    assert picked.dropped is not None and picked.dropped.tolist() == [False, True]


def test_an_empty_text_longer_than_the_words_makes_room():
    short = build_condition(torch.zeros(2, 2, dtype=torch.long), (1, 2), *glyphs(1, 1), None)
    dropped = drop_rows(short, torch.tensor([False, True]), torch.full((1, 3, 2), 9.0))
    assert read(dropped) == [[1], [9, 9, 9]]
    all_dropped = drop_rows(condition(), torch.ones(6, dtype=torch.bool), EMPTY)
    assert all_dropped.glyph.shape == (6, 1, 2) and read(all_dropped) == [[9]] * 6
    for wrong in (torch.tensor([True]), torch.ones(2)):
        with pytest.raises(ValueError, match=r"drop must be bool \[2\]"):
            drop_rows(short, wrong, EMPTY)


def test_the_edges_of_the_codebook():
    check_tokens("tokens", torch.tensor([[0, 63]]), (1, 2), 64)
    for wrong in (torch.tensor([[0, 64]]), torch.tensor([[-1, 0]])):
        with pytest.raises(ValueError, match=r"tokens must be image codes in \[0, 64\)"):
            check_tokens("tokens", wrong, (1, 2), 64)
    with pytest.raises(ValueError, match=r"tokens must be \[B, 2\] for grid \(1, 2\)"):
        check_tokens("tokens", torch.zeros(1, 3, dtype=torch.long), (1, 2), 64)


def test_sources_cover_32_pixels_a_token():
    tokens = torch.zeros(2, 6, dtype=torch.long)
    check_sources(2, torch.zeros(2, 3, 64, 96), tokens, (2, 3), 64)
    for size in ((96, 64), (64, 64)):
        with pytest.raises(ValueError, match=r"do not match source_grid \(2, 3\)"):
            check_sources(2, torch.zeros(2, 3, *size), tokens, (2, 3), 64)
    for count, rows in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="for each of 2 prompts"):
            check_sources(2, torch.zeros(count, 3, 64, 96), tokens[:rows], (2, 3), 64)
