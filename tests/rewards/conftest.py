"""Images and files that the reward tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tests.reward_files import write_alexnet


@pytest.fixture(scope="session")
def draw_sign() -> Callable[..., torch.Tensor]:
    """draw_sign(*lines, side=128, ink="black", paper="white") -> [3, side, side] with the lines drawn on it."""

    def draw(*lines: str, side: int = 128, ink: str = "black", paper: str = "white") -> torch.Tensor:
        image = Image.new("RGB", (side, side), paper)
        font = ImageFont.load_default(size=24 * side // 128)
        for row, line in enumerate(lines):
            ImageDraw.Draw(image).text((side // 12, side // 10 + row * side // 3), line, font=font, fill=ink)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    return draw


@pytest.fixture(scope="session")
def noise() -> torch.Tensor:
    """[1, 3, 128, 128] uniform noise."""
    return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def picture() -> torch.Tensor:
    """[1, 3, 128, 128] a smooth picture with edges."""
    grid = torch.linspace(0, 1, 128)
    image = torch.stack(
        [grid.expand(128, 128), grid[:, None].expand(128, 128), (grid * 9).sin().abs().expand(128, 128)]
    )
    image[:, 30:80, 40:90] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return image[None]


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_alexnet`."""
    return write_alexnet(tmp_path_factory.mktemp("alexnet") / "alexnet.pth")
