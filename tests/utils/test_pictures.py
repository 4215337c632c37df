import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.utils import pictures
from glm_training.utils.pictures import GREEN, LABEL_WIDTH, NO_CAPTION, Caption, save_grid, save_image, to_pil


def test_values_are_clamped_and_rounded():
    image = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, float("nan")]).repeat(3, 1)[:, None]
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0]
    with pytest.raises(ValueError, match=r"\[3, H, W\], not \[1, 2, 2\]"):
        to_pil(torch.zeros(1, 2, 2))


def test_save_image_makes_folders_and_keeps_pixels(tmp_path):
    image = torch.rand(3, 5, 7, generator=torch.Generator())
    save_image(tmp_path / "a" / "b.png", image)
    loaded = np.asarray(Image.open(tmp_path / "a" / "b.png"))
    assert loaded.shape == (5, 7, 3)
    np.testing.assert_allclose(loaded / 255, image.permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)


def test_the_grid_shows_every_picture_beside_its_label(tmp_path):
    red, green = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    red[0], green[1] = 1, 1
    path = tmp_path / "samples" / "grid.png"
    save_grid(path, [[red, green], [green, to_pil(red)]], ["a red square", "a long " * 40], ["before", "after"])
    grid = np.asarray(Image.open(path)).astype(int)
    left = pictures.LABEL_WIDTH + 2 * pictures.MARGIN
    middle = left + 192 + pictures.MARGIN // 2

    def side(part, channel):
        rows = np.argwhere((part[..., channel] == 255) & (part.sum(-1) == 255))
        return rows[:, 0].min()

    assert side(grid[:, left:middle], 0) < side(grid[:, left:middle], 1)
    assert side(grid[:, middle:], 1) < side(grid[:, middle:], 0)
    labels = grid[:, :left] < 100
    assert labels.any() and not labels[:, pictures.LABEL_WIDTH + pictures.MARGIN + 2 :].any()


def test_text_wraps_between_words_and_cuts_what_has_none():
    font = pictures.ImageFont.load_default(size=15)
    for text in ["one two three four five six seven", "x" * 200, "a " + "y" * 90, ""]:
        wrapped = pictures._wrap(text, font, 100)
        assert all(font.getlength(line) <= 100 for line in wrapped.split("\n"))
        assert wrapped.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    assert "one two" in pictures._wrap("one two three four", font, 100)


def test_letters_that_pillows_font_lacks_are_drawn_in_one_that_has_them(tmp_path):
    own = pictures.font_for(["a sign, 3-0"])
    assert own.getname() == pictures.ImageFont.load_default(size=15).getname()
    try:
        pictures.ImageFont.truetype("DejaVuSans.ttf", 15)
    except OSError:
        pytest.skip("DejaVu is not on this machine")
    words = "é ü ł Жук"
    font = pictures.font_for(["a sign", words])
    letters = words.replace(" ", "")
    assert len({bytes(font.getmask(letter)) for letter in letters + pictures.NO_LETTER}) == len(letters) + 1
    boxes = Image.new("RGB", (8, 8))
    for number, label in enumerate(("é", "ü")):
        pictures.save_sheet(tmp_path / f"{number}.png", [boxes], [label])
        pictures.save_grid(tmp_path / f"grid{number}.png", [[boxes]], [label], [""])
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    assert (tmp_path / "grid0.png").read_bytes() != (tmp_path / "grid1.png").read_bytes()


def test_without_another_font_letters_are_drawn_as_they_can_be(monkeypatch):
    monkeypatch.setattr(pictures, "FONTS", ("no such font.ttf",))
    assert pictures.font_for(["é"]).getname() == pictures.ImageFont.load_default(size=15).getname()


def test_large_pictures_shrink_and_small_ones_stay_square(tmp_path):
    assert pictures._fit(Image.new("RGB", (1024, 512))).size == (384, 192)
    assert pictures._fit(Image.new("RGB", (32, 16))).size == (160, 80)
    assert pictures._fit(Image.new("RGB", (128, 128))).size == (256, 256)
    assert pictures._fit(Image.new("RGB", (128, 128)), 160).size == (128, 128), "not enlarged beyond the largest"
    assert pictures._fit(Image.new("RGB", (1024, 512)), 160).size == (160, 80)


def test_labels_must_fit_the_rows(tmp_path):
    with pytest.raises(ValueError, match=r"1 row and 2 column labels for rows of \[1\] images"):
        save_grid(tmp_path / "g.png", [[torch.zeros(3, 4, 4)]], ["a"], ["b", "c"])


def test_captions_stand_below_their_pictures_and_good_ones_are_framed(tmp_path):
    red = Image.new("RGB", (160, 160), (255, 0, 0))
    captions = [[Caption("reward 0.5"), Caption("right", good=True)]]
    save_grid(tmp_path / "bare.png", [[red, red]], ["a"], ["before", "after"])
    save_grid(tmp_path / "told.png", [[red, red]], ["a"], ["before", "after"], captions=captions)
    bare, told = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("bare.png", "told.png"))
    assert told.shape[0] == bare.shape[0] + pictures.FONT_SIZE + 4 and told.shape[1] == bare.shape[1]
    left = LABEL_WIDTH + 2 * pictures.MARGIN
    top = np.argwhere((bare == (255, 0, 0)).all(-1))[0][0]
    assert (told[top, left] == (255, 0, 0)).all(), "no frame"
    second = left + 160 + pictures.MARGIN
    assert (told[top, second] == GREEN).all() and (told[top + 159, second + 159] == GREEN).all()
    assert (told[top + pictures.FRAME, second + pictures.FRAME] == (255, 0, 0)).all()
    below = told[top + 160 :, left:second]
    assert (below < 200).any() and (below[..., 0] == below[..., 1]).all(), "grey text"


def test_rows_stand_in_two_halves_side_by_side(tmp_path):
    """Three rows: two on the left, the third on the right, each half with the headings."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    rows = [[Image.new("RGB", (160, 160), colour)] for colour in colours]
    for name, abreast in (("one.png", 1), ("two.png", 2)):
        save_grid(tmp_path / name, rows, ["a", "b", "c"], ["now"], "3 prompts", abreast=abreast)
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert two.shape[1] == 2 * one.shape[1] and one.shape[0] - two.shape[0] == 160 + pictures.MARGIN
    places = [np.argwhere((two == colour).all(-1))[0].tolist() for colour in colours]
    assert places[0][0] == places[2][0] < places[1][0] and places[0][1] == places[1][1]
    assert places[2][1] == places[0][1] + one.shape[1]
    heads = two[: places[0][0]]
    assert (heads[:, : one.shape[1]] == heads[:, one.shape[1] :]).all()


def test_captions_must_fit_the_rows(tmp_path):
    with pytest.raises(ValueError, match=r"2 column labels for rows of \[2, 1\] images"):
        save_grid(tmp_path / "g.png", [[Image.new("RGB", (4, 4))] * 2], ["a"], ["b", "c"], captions=[[NO_CAPTION]])


def test_rows_without_labels_have_no_room_for_them(tmp_path):
    """Pictures begin behind the corner's one line, not behind a column of prompts that is not there."""
    picture = Image.new("RGB", (8, 8), (200, 0, 0))
    for labels, name in ((["", ""], "bare.png"), (["a", ""], "told.png")):
        save_grid(tmp_path / name, [[picture], [picture]], labels, ["now"], "2 pictures")
    bare, told = (Image.open(tmp_path / name).size for name in ("bare.png", "told.png"))
    assert bare[1] == told[1] and bare[0] < told[0] - LABEL_WIDTH // 3
