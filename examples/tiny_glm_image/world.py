"""The small world the tiny GLM-Image lives in: coloured shapes with a relation or a count, and words on signs, 128x128.

A `Scene` is one picture's content; `Scene.prompt()` says it and `draw(scene, jitter)` paints it. Held-out scenes
(`is_held_out`) recombine known parts: a known word on a sign colour it never had, a pair of shapes in a relation they
never stood in, a count or a colour a shape never had. An `Edit` is a source scene, an instruction and the scene that
results.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from glm_training.rewards.shapes import BACKGROUND, COLORS, SHAPES

SIZE = 128
SIGN_COLORS = ("red", "green", "blue", "purple", "black")
RELATIONS = ("left of", "above")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
WORDS = (
    "CAFE", "OPEN", "STOP", "EXIT", "TAXI", "BANK", "HOTEL", "SALE", "FISH", "BOOK", "MILK", "ZOO", "PARK", "SHOP",
    "BUS", "GYM", "FARM", "JAZZ", "DUCK", "LION", "MOON", "PIZZA", "SOUP", "TEA",
)  # fmt: skip
UNSEEN_WORDS = ("BIRD", "COFFEE", "GOLD", "KING", "RAIN", "WOLF", "LAMP", "TRUCK")
"""Never in a training picture: measured and reported only."""


@dataclass(frozen=True)
class Scene:
    """Either a sign (`word`) or `count` copies of one shape or two shapes in a `relation`."""

    color: str
    shape: str = ""
    count: int = 1
    relation: str = ""
    other_color: str = ""
    other_shape: str = ""
    word: str = ""

    @property
    def kind(self) -> str:
        """ "sign", "relation", "count" or "single"."""
        if self.word:
            return "sign"
        return "relation" if self.relation else ("count" if self.count > 1 else "single")

    def prompt(self) -> str:
        """What a user would type."""
        if self.word:
            return f'{_article(self.color)} {self.color} sign that says "{self.word}"'
        if self.relation:
            return (
                f"{_article(self.color)} {self.color} {self.shape} {self.relation} "
                f"{_article(self.other_color)} {self.other_color} {self.other_shape}"
            )
        if self.count > 1:
            return f"{COUNTS[self.count]} {self.color} {self.shape}s"
        return f"{_article(self.color)} {self.color} {self.shape}"


@dataclass(frozen=True)
class Edit:
    """An image-to-image task: `instruction` turns `source` into `target`; both are drawn with the same jitter."""

    source: Scene
    instruction: str
    target: Scene


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's combination is kept out of training (a quarter of signs, relations and counts)."""
    if scene.kind == "single":
        return False
    parts = {
        "sign": (scene.word, scene.color),
        "relation": (scene.shape, scene.relation, scene.other_shape, scene.color),
        "count": (str(scene.count), scene.color, scene.shape),
    }[scene.kind]
    return hashlib.blake2b("|".join(parts).encode(), digest_size=2).digest()[0] < 64


@cache
def all_scenes(held_out: bool) -> dict[str, tuple[Scene, ...]]:
    """Every scene of one side of the split, by kind."""
    signs = [Scene(color, word=word) for color, word in itertools.product(SIGN_COLORS, WORDS)]
    singles = [Scene(color, shape) for color, shape in itertools.product(COLORS, SHAPES)]
    counts = [Scene(c, s, n) for c, s, n in itertools.product(COLORS, SHAPES, (2, 3, 4))]
    relations = [
        Scene(c, s, 1, relation, c2, s2)
        for c, s, relation, c2, s2 in itertools.product(COLORS, SHAPES, RELATIONS, COLORS, SHAPES)
        if c != c2
    ]
    groups = {"sign": signs, "single": singles, "count": counts, "relation": relations}
    return {kind: tuple(s for s in group if is_held_out(s) == held_out) for kind, group in groups.items()}


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene: half signs, a third relations, the rest counts and single shapes."""
    scenes = all_scenes(held_out)
    kinds = ("sign", "relation", "count") if held_out else ("sign", "relation", "count", "single")
    weights = (0.5, 0.3, 0.2) if held_out else (0.45, 0.3, 0.17, 0.08)
    group = scenes[kinds[rng.choice(len(kinds), p=weights)]]
    return group[rng.integers(len(group))]


def sample_edit(rng: np.random.Generator, held_out: bool = False) -> Edit:
    """A recolouring of a shape or sign, or a change of the word on a sign; the target obeys the split."""
    while True:
        target = sample_scene(rng, held_out)
        if target.word and rng.random() < 0.6:
            source = replace(target, word=str(rng.choice([w for w in WORDS if w != target.word])))
            return Edit(source, f'change the word to "{target.word}"', target)
        palette = SIGN_COLORS if target.word else tuple(COLORS)
        old = str(rng.choice([c for c in palette if c not in (target.color, target.other_color)]))
        source = replace(target, color=old)
        noun = "sign" if target.word else target.shape + ("s" if target.count > 1 else "")
        if target.relation and target.shape == target.other_shape:
            noun = f"{old} {noun}"
        if not (target.word and is_held_out(source)):
            return Edit(source, f"make the {noun} {target.color}", target)


@dataclass(frozen=True)
class Jitter:
    """Where the picture's content stands: `dx, dy` in {-1, 0, 1} steps to the right and down."""

    dx: int
    dy: int

    @staticmethod
    def sample(rng: np.random.Generator) -> Jitter:
        """A random one."""
        dx, dy = rng.integers(-1, 2, 2).tolist()
        return Jitter(dx, dy)


def draw(scene: Scene, jitter: Jitter) -> Image.Image:
    """The scene as a 128x128 RGB picture."""
    factor = 2  # drawn larger and shrunk, for smooth edges
    image = Image.new("RGB", (SIZE * factor, SIZE * factor), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    if scene.word:
        _draw_sign(canvas, scene, jitter, factor)
    else:
        for x, y, radius, color, shape in _objects(scene, jitter):
            _draw_shape(canvas, x * factor, y * factor, radius * factor, COLORS[color], shape)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _objects(scene: Scene, jitter: Jitter) -> list[tuple[float, float, float, str, str]]:
    """(x, y, radius, colour, shape) of each; all keep clear of the borders between the 64 px quarters they stand in."""
    x, y = 3.0 * jitter.dx, 3.0 * jitter.dy
    if scene.relation:
        left, up = {"left of": (-32, 0), "above": (0, -32)}[scene.relation]
        first = (64 + left + x, 64 + up + y, 23.0, scene.color, scene.shape)
        return [first, (64 - left + x, 64 - up + y, 23.0, scene.other_color, scene.other_shape)]
    centres = {
        1: [(64, 64)],
        2: [(32, 64), (96, 64)],
        3: [(64, 32), (32, 96), (96, 96)],
        4: [(32, 32), (96, 32), (32, 96), (96, 96)],
    }[scene.count]
    radius = 28.0 if scene.count == 1 else 23.0
    return [(cx + x, cy + y, radius, scene.color, scene.shape) for cx, cy in centres]


def _draw_shape(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, color: tuple[int, int, int], shape: str):
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        r *= 0.88
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=color)
    else:
        canvas.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=color)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _draw_sign(canvas: ImageDraw.ImageDraw, scene: Scene, jitter: Jitter, factor: int) -> None:
    x, y = (64 + 3 * jitter.dx) * factor, (60 + 12 * jitter.dy) * factor
    half_w, half_h = 57 * factor, 23 * factor
    canvas.rectangle((x - 3 * factor, y, x + 3 * factor, SIZE * factor), fill=(120, 110, 100))
    canvas.rounded_rectangle((x - half_w, y - half_h, x + half_w, y + half_h), 7 * factor, fill=COLORS[scene.color])
    size = 34 if len(scene.word) <= 4 else 31
    canvas.text(
        (x, y), scene.word, fill=(255, 255, 255), font=_font(size * factor), anchor="mm", stroke_width=factor // 2,
        stroke_fill=(255, 255, 255),
    )  # fmt: skip
