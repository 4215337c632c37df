"""The template, left padding, orders, positions, masks and groups of VGT's sequences, by hand."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.vgt.prompt_text import MAX_TEXT_TOKENS, PromptText
from glm_training.models.vgt.sequence import (
    Prompts,
    group_sizes,
    interleaved,
    orders_of_rows,
    random_orders,
    raster,
    raster_order,
    sequence_positions,
    visible_keys,
    written,
)
from glm_training.models.vgt.tiny_generator import tiny_tokenizer

TOKENIZER = tiny_tokenizer(["Generate an image: a red circle", "user assistant"])
TEXT = PromptText(TOKENIZER)
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"


def stock_ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def real_ids(prompts: Prompts, row: int) -> list[int]:
    return prompts.ids[row][prompts.mask[row]].tolist()


def test_the_template_is_the_published_one() -> None:
    prompts = TEXT.encode(["a red circle", "", " \n", "Ünï 漢字"])
    captions = ["Generate an image: a red circle", *["Generate an image."] * 2, "Generate an image: Ünï 漢字"]
    for row, caption in enumerate(captions):
        assert real_ids(prompts, row) == stock_ids(TURN.format(caption))
    assert TOKENIZER.convert_ids_to_tokens(prompts.ids[:, -1].tolist()) == ["<img>"] * 4


def test_padding_stands_on_the_left_and_joins() -> None:
    prompts = Prompts.of([[5], [6, 7, 8]], pad_id=9)
    assert prompts.ids.tolist() == [[9, 9, 5], [6, 7, 8]] and prompts.padded
    assert prompts.mask.tolist() == [[False, False, True], [True, True, True]]
    assert prompts.lengths().tolist() == [[1], [3]]
    alone = Prompts.of([[1, 2]], pad_id=9)
    assert not alone.padded and not alone.joined(alone).padded and len(alone.repeated(3)) == 3
    both = alone.repeated(2).joined(prompts)
    assert both.mask.tolist() == [[False, True, True]] * 2 + prompts.mask.tolist() and both.padded
    assert both.ids[:, 1:].tolist() == [[1, 2], [1, 2], [9, 5], [7, 8]]
    assert alone.joined(Prompts.of([[1, 2, 3]], pad_id=9)).padded


def test_a_long_caption_is_cut_and_the_turn_still_closed() -> None:
    long = "q" * 300  # no merge knows it: one token a letter
    prompts = TEXT.encode([long, "q"])
    ids = real_ids(prompts, 0)
    assert len(ids) == MAX_TEXT_TOKENS + 1
    around = len(stock_ids(TURN.format("Generate an image: "))) - 1  # all but <img>
    # the tokens around and those of the caption that are kept make 256
    kept = TOKENIZER.decode(ids).count("q")
    assert kept == MAX_TEXT_TOKENS - around or kept == MAX_TEXT_TOKENS - around + 1  # " q" is a token less
    assert ids[-len(stock_ids("<|im_end|>\n<|im_start|>assistant\n<img>")) :] == stock_ids(
        "<|im_end|>\n<|im_start|>assistant\n<img>"
    )
    whole, same, cut = TEXT.read(["q", "q" * kept, long])
    assert (whole.cut, same.cut, whole.fault, cut.fault) == (None, None, None, None)
    assert cut.cut is not None and "q" in cut.cut
    assert cut.read == TEXT.read([long + " and more"])[0].read, "what is read of both is the same"


def test_a_caption_cannot_spell_the_marks() -> None:
    ids = real_ids(TEXT.encode(["a<|im_end|><img><|endoftext|>"]), 0)
    marks = {name: TOKENIZER.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<img>", "<|endoftext|>")}
    assert [ids.count(marks[name]) for name in marks] == [1, 1, 0]
    assert "a<|im_end|><img><|endoftext|><|im_end|>" in TOKENIZER.decode(ids)


@pytest.mark.parametrize("prompts", [[], "a red circle"])
def test_refuses_what_is_no_list_of_prompts(prompts) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        TEXT.encode(prompts)


def test_refuses_a_tokenizer_without_the_marks() -> None:
    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {"<|im_start|>": 0}

    with pytest.raises(ValueError, match=r"<\|im_end\|>, <img>"):
        PromptText(Bare())  # type: ignore[arg-type]


def test_orders() -> None:
    assert raster_order(4).tolist() == [0, 1, 2, 3]
    names = [(step,) for step in range(200)]
    orders = random_orders(1, "order", names, 6)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(6).expand(200, 6)), "each place once"
    assert torch.equal(orders[7], random_orders(1, "order", [(7,)], 6)[0]), "named by its own name alone"
    assert len({tuple(order) for order in orders.tolist()}) > 100
    first = torch.bincount(orders[:, 0], minlength=6)  # 200 draws of 1/6: 33.3, standard deviation 5.3
    assert first.min() > 10 and first.max() < 60
    assert orders_of_rows(orders[0], 3, 6).shape == (3, 6) and orders_of_rows(orders[:3], 3, 6).shape == (3, 6)
    with pytest.raises(ValueError, match=r"order must be \[6\] or \[2, 6\]"):
        orders_of_rows(orders[:3], 2, 6)


def test_written_and_back_and_interleaved_by_hand() -> None:
    tokens = torch.tensor([[[10.0], [11.0], [12.0]]])
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert written(tokens, order)[..., 0].tolist() == [[12, 10, 11], [11, 12, 10]]
    assert raster(written(tokens, order), order)[..., 0].tolist() == [[10, 11, 12]] * 2
    pairs = interleaved(written(tokens, order), -written(tokens, order))
    assert pairs[..., 0].tolist() == [[12, -12, 10, -10, 11, -11], [11, -11, 12, -12, 10, -10]]


def test_positions_by_hand() -> None:
    mask = Prompts.of([[1], [1, 1, 1]], pad_id=0).mask
    assert sequence_positions(mask, 4).tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


def seen(mask: torch.Tensor, row: int = 0) -> list[str]:
    return ["".join("x" if look else "." for look in line) for line in mask[row, 0].tolist()]


def test_what_is_seen_by_hand() -> None:
    even, odd = Prompts.of([[1, 2]], 0), Prompts.of([[1, 2], [3]], 0)
    assert visible_keys(even, 0, 4) is None, "plain causal attention, for which no mask is needed"
    assert visible_keys(even, 0, 2, 1, queries_see_each_other=False) is None
    training = visible_keys(odd, 0, 4)
    assert seen(training, 0) == ["x...", "xx..", "xxx.", "xxxx"]
    assert seen(training, 1) == ["x...", ".x..", ".xx.", ".xxx"], "padding is seen by itself alone"
    # three tokens in the cache, one read, two queries
    for apart, last in ((False, ".xxxxx"), (True, ".xxx.x")):
        mask = visible_keys(odd, 3, 1, 2, queries_see_each_other=not apart)
        assert seen(mask, 1) == [".xxx..", ".xxxx.", last]
        assert seen(mask, 0) == ["xxxx..", "xxxxx.", last.replace(".", "x", 1)]
    assert seen(visible_keys(even, 0, 2, 2, queries_see_each_other=False)) == ["x...", "xx..", "xxx.", "xx.x"]
    assert visible_keys(even, 3, 1, 1).shape == (1, 1, 2, 5)


def test_group_sizes() -> None:
    assert group_sizes(256, 16) == [16] * 16 and group_sizes(256, 1) == [1] * 256
    assert group_sizes(256, 100) == [128, 128] and group_sizes(10, 3) == [4, 3, 3] and group_sizes(4, 9) == [4]
    with pytest.raises(ValueError, match="acc_ratio must be"):
        group_sizes(4, 0)
