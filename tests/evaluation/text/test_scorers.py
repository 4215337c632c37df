"""The scoring rules of CVTG-2K and LongText-Bench against answers worked out by hand."""

from __future__ import annotations

import pytest

from glm_training.evaluation.text.cvtg import clip_score, quoted_words, read_words, similarities, words_found
from glm_training.evaluation.text.longtext import matched, units


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A kiosk says 'Information Here', a banner 'Cold Drinks'.", ["information", "here", "cold", "drinks"]),
        ("A clock reads '12:00' and a note '  NEXT  stop '", ["12:00", "next", "stop"]),
        ("nothing quoted", []),
        ("an empty '' and \"double\" marks", []),
        ("the baker's sign 'Open'", ["s", "sign"]),  # their rule: an apostrophe opens a quotation
        ("'two' 'twice' 'two'", ["two", "twice", "two"]),
    ],
)
def test_words_asked_for_are_those_in_single_quotes(prompt, words):
    assert quoted_words(prompt) == words


def test_words_are_found_by_membership():
    read = read_words(["Cold DRINKS here", "now"])
    assert read == ["cold", "drinks", "here", "now"]
    wanted = ["cold", "drink", "here", "here", "here!", "now"]
    # a part of a word is none, one reading serves a word asked for twice, and marks count
    assert words_found(wanted, read) == [True, False, True, True, False, True]
    assert words_found(["a"], []) == [False]


def test_similarities_are_edit_distances_to_the_nearest_reading():
    read = ["coffee", "tea"]
    # cafee -> coffee: a becomes o, an f is put in, so 2 of 6; tee -> tea: 1 of 3; exact: 0
    values = similarities(["cafee", "tee", "tea"], read)
    assert values == pytest.approx([1 - 2 / 6, 1 - 1 / 3, 1], abs=1e-5)
    # the longer of the two lengths counts: 'tea' for 'teapots' keeps 3 of 7
    assert similarities(["teapots"], ["tea"]) == pytest.approx([3 / 7], abs=1e-5)
    assert similarities(["x"], []) == [0] and similarities(["x"], ["yz"]) == pytest.approx([0], abs=1e-5)
    # the small number below the line makes 1 - 1 / (2 + 1e-5) of it, a little more than a half
    assert similarities(["ab"], ["ac"])[0] == 1 - 1 / 2.00001


def test_the_nearest_reading_is_difflibs_not_the_one_of_fewest_edits():
    """By difflib's ratio, 2 M / T with M letters in matching blocks: 'abcd' against 'bcda' 6/8, against 'axxd' 4/8. The
    edits are 2 for both."""
    assert similarities(["abcd"], ["axxd", "bcda"]) == pytest.approx([1 - 2 / 4], abs=1e-5)
    # 'abcde': 'deabc' has the block abc, 6/10 and 4 edits; 'axcxe' has a, c, e, 6/10 and 2; of equals the later in
    # the alphabet is taken
    assert similarities(["abcde"], ["deabc", "axcxe"]) == pytest.approx([1 - 4 / 5], abs=1e-5)


def test_clip_score():
    assert [clip_score(cosine) for cosine in (0.3, 0.0, -0.2)] == [0.75, 0, 0]


@pytest.mark.parametrize(
    ("wanted", "lines", "counts"),
    [
        (["FRESH BREWS, every day"], ["fresh brews", "EVERY  DAY!"], (4, 4)),
        (["the the the"], ["the cat, the"], (2, 3)),  # as often as it was read
        (["two", "lines"], ["lines two lines"], (2, 2)),  # in whatever order
        (["Café à 5-1998"], ["cafe à 51998"], (2, 3)),  # accents are letters, hyphens are nothing
        (["don't"], ["dont"], (1, 1)),
        (["one", "two"], ["onetwo"], (0, 2)),
        (["a"], [], (0, 1)),
        (["***"], ["x"], (0, 0)),
    ],
)
def test_english_is_counted_by_words(wanted, lines, counts):
    assert matched(wanted, lines, "en") == counts


@pytest.mark.parametrize(
    ("wanted", "lines", "counts"),
    [
        (["每日新鲜烘焙"], ["每日 新鲜", "烘烤"], (5, 6)),
        (["本地烘焙，始于1998"], ["1998本地"], (6, 10)),
        (["好好好"], ["好好"], (2, 3)),
        (["Go 去"], ["go去"], (2, 3)),  # case counts here, spaces do not: G is not g
    ],
)
def test_chinese_is_counted_by_characters(wanted, lines, counts):
    assert matched(wanted, lines, "zh") == counts


def test_units_leave_marks_out():
    assert units("A-b, c_d\n2.5%", "en") == ["ab", "cd", "25"]
    assert units(" A-b，在\n2.5% ", "zh") == ["A", "b", "在", "2", "5"]
