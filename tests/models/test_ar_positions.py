"""Grids and M-RoPE positions against the stock processor and the stock `get_rope_index`."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GlmImageProcessor
from transformers.models.glm_image.modeling_glm_image import GlmImageModel

from glm_training.models.glm_image.positions import decode_positions, generation_grids, image_grid, prompt_positions

START, END, IMAGE, PAD = 900, 901, 902, 903


class StockPositions:
    """The stock method with what it needs of its model, which is two ids."""

    config = SimpleNamespace(image_start_token_id=START, image_end_token_id=END)
    get_vision_position_ids = GlmImageModel.get_vision_position_ids
    get_rope_index = GlmImageModel.get_rope_index
    _cached_decode_position_ids: torch.Tensor


def batch(text_lengths, source=None):
    """Left-padded ids and mask: image (when there is one), text, start token."""
    rows = []
    for length in text_lengths:
        image = [] if source is None else [START, *[IMAGE] * (source[0] * source[1]), END]
        rows.append([*image, *range(length), START])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("text_lengths", [[7], [7, 7], [3, 9, 1]])
@pytest.mark.parametrize("source", [None, (3, 5), (5, 3), (4, 4), (1, 1)])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 256), (512, 96)])
def test_positions_equal_the_stock_ones(text_lengths, source, height, width):
    ids, mask = batch(text_lengths, source)
    grids = generation_grids(height, width, "t2i" if source is None else "i2i")
    stock = StockPositions()
    stored = [grid for grid in ([source] if source else []) + list(reversed(grids))]
    expected, _ = stock.get_rope_index(
        ids,
        image_grid_thw=torch.tensor([[1, *grid] for grid in stored * len(ids)]),
        images_per_sample=torch.full((len(ids),), len(stored)),
        attention_mask=mask,
    )

    positions, start = prompt_positions(ids, mask, START, source)

    assert positions.dtype == torch.long
    assert torch.equal(positions, expected)
    decoding = decode_positions(start, grids)
    # the stock schedule ends with the place of the end token, which is not written here
    assert torch.equal(decoding, stock._cached_decode_position_ids.permute(1, 0, 2)[:, :, :-1])


def test_positions_of_one_i2i_prompt_by_hand():
    ids, mask = batch([2], source=(2, 3))
    positions, start = prompt_positions(ids, mask, START, (2, 3))
    time, row, column = positions[:, 0].tolist()
    # start, six image tokens from 1 on, then everything after them from 1 + max(2, 3) on
    assert time == [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7]
    assert row == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7]
    assert column == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert start.tolist() == [8]


def test_decode_positions_by_hand():
    time, row, column = decode_positions(torch.tensor([10, 20]), ((1, 2), (2, 1)))[:, 1].tolist()
    assert time == [20, 20, 22, 22]
    assert row == [20, 20, 22, 23]
    assert column == [20, 21, 22, 22]


def test_grids_equal_the_processors_for_every_size():
    for rows in range(1, 65):
        for columns in range(1, 65):
            stock = GlmImageProcessor._get_target_shape(None, height=rows * 32, width=columns * 32)
            preview, large = generation_grids(rows * 32, columns * 32, "t2i")
            assert (*large, *preview) == stock
            assert generation_grids(rows * 32, columns * 32, "i2i") == (large,)


@pytest.mark.parametrize(("height", "width", "named"), [(100, 128, "height"), (128, 33, "width"), (0, 128, "height")])
def test_sizes_that_are_no_multiple_of_32_are_refused(height, width, named):
    with pytest.raises(ValueError, match=f"{named} is"):
        image_grid(height, width)
    with pytest.raises(ValueError, match="multiple of 32"):
        generation_grids(height, width, "t2i")


def test_a_size_without_a_preview_is_refused():
    with pytest.raises(ValueError, match="elongated"):
        generation_grids(32, 32 * 257, "t2i")
