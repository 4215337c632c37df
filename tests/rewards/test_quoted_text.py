"""Which parts of a prompt count as text to draw."""

import pytest

from glm_training.rewards import quoted_text


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ('"ONE" above "TWO WORDS"', ["ONE", "TWO WORDS"]),
        ("a poster, “Grand Opening” and „Eingang“", ["Grand Opening", "Eingang"]),
        ("a shop sign 「営業中」 and 『禁煙』", ["営業中", "禁煙"]),
        ("写着“欢迎光临”的牌子和写着\"你好\"的牌子，还有'再见'的牌子", ["欢迎光临", "你好", "再见"]),
        ("une affiche « Soldes »", ["Soldes"]),
        ("a card with ＂ＨＩ＂", ["ＨＩ"]),
        ("a mug that says 'TEA', and a cup", ["TEA"]),
        ("a door marked 'don't knock'", ["don't knock"]),
        ("a door marked ‘don’t knock’", ["don’t knock"]),
        ("""'He said "HI"' on a wall""", ['He said "HI"']),
        ("""a banner "It's 5 o'clock" """, ["It's 5 o'clock"]),
    ],
)
def test_every_quoted_span(prompt: str, spans: list[str]) -> None:
    assert quoted_text(prompt) == spans


@pytest.mark.parametrize(
    "prompt",
    [
        "the dog's bowl and the cat's bed",
        "the dogs' bowl and the cats' bed",
        "it isn't the baker's, it's James' and the girls'",
        "rock 'n' roll in the '90s, 'tis the season to get 'em at the dogs' park",
        "the dog’s bowl and the cats’ bed",
        'a 12" pizza next to a 14" pizza',
        "a 6' tall man and a 5' tall woman",
        'an empty "" and a blank " "',
        "an unclosed \"quotation and an unclosed 'one",
        "no quotes at all",
    ],
)
def test_apostrophes_and_inches_open_nothing(prompt: str) -> None:
    assert quoted_text(prompt) == []


def test_apostrophes_next_to_real_quotes() -> None:
    assert quoted_text("the baker's sign reads 'FRESH BREAD' and it's the dogs' \"FAVOURITE\"") == [
        "FRESH BREAD",
        "FAVOURITE",
    ]
    assert quoted_text('a man 5\'10" tall holding a "HELLO" board') == ["HELLO"]
