"""A small world of pictures whose every word has an exact mask.

A scene holds one to three flat-colored shapes on a textured grey background, 64x64 pixels. Within a scene no two shapes share
a color or a form, so each color word and each shape word of a caption names exactly one object. Everything about scene number
`index` follows from `(seed, index)` alone: the same two integers give the same picture, caption and questions on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 133, 20),
    "yellow": (250, 225, 50),
    "green": (50, 165, 70),
    "blue": (45, 90, 215),
    "purple": (130, 50, 165),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
}
RADII = {"small": (7.0, 9.0), "large": (11.0, 14.0)}
"""Radius of the circle around a shape, in pixels, by size word."""
NUMBERS = ("zero", "one", "two", "three")
QUESTION_TYPES = ("color", "shape", "count", "existence", "position")
DESCRIBE = "Describe the picture."
MEASURED_KINDS = ("color", "shape")
"""Kinds of caption words that localization is measured on: a size word may fit several objects."""

_SUPERSAMPLING = 4
_MARGIN = 2.0


@dataclass(frozen=True)
class SceneObject:
    """One shape: `x`, `y` and `radius` in pixels, y pointing down."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Referent:
    """A caption word that names an object: characters `[start, end)` of the caption, and the object's index.

    `kind` is `"color"`, `"shape"` or `"size"`.
    """

    start: int
    end: int
    kind: str
    object_index: int


@dataclass(frozen=True)
class Question:
    """A question about a scene; `type` is one of `QUESTION_TYPES`, `answer` a single lower-case word."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its exact masks, its caption and its questions.

    `pixels` is uint8 [64, 64, 3]; `masks` is bool [objects, 64, 64], true where a pixel belongs to that object.
    """

    objects: tuple[SceneObject, ...]
    pixels: np.ndarray
    masks: np.ndarray
    caption: str
    referents: tuple[Referent, ...]
    questions: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def word_mask(self, referent: Referent) -> np.ndarray:
        """Exact bool [64, 64] mask of the object that a caption word names."""
        return self.masks[referent.object_index]


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world with this `seed` (both non-negative)."""
    rng = np.random.default_rng([seed, index])
    objects = _place_objects(rng)
    pixels, masks = _render(rng, objects)
    caption, referents = _describe(rng, objects)
    return Scene(objects, pixels, masks, caption, referents, _ask(rng, objects))


def make_scenes(seed: int, count: int, start: int = 0) -> Iterator[Scene]:
    """Scenes `start`, ..., `start + count - 1` of the world with this `seed`."""
    return (make_scene(seed, index) for index in range(start, start + count))


def _place_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    count = int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))
    shapes = rng.permutation(SHAPES)[:count]
    colors = rng.permutation(list(COLORS))[:count]
    while True:
        sizes = [str(rng.choice(list(RADII))) for _ in range(count)]
        placed: list[SceneObject] = []
        for shape, color, size in zip(shapes, colors, sizes, strict=True):
            radius = float(rng.uniform(*RADII[size]))
            low, high = radius + _MARGIN, IMAGE_SIZE - radius - _MARGIN
            for _ in range(20):
                x, y = (float(v) for v in rng.uniform(low, high, size=2))
                if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + _MARGIN for o in placed):
                    placed.append(SceneObject(str(shape), str(color), size, x, y, radius))
                    break
        if len(placed) == count:
            return tuple(placed)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points belong to a shape whose circumscribed circle has radius one; v points down."""
    distance = np.hypot(u, v)
    if shape == "circle":
        return distance <= 0.92
    if shape == "ring":
        return (distance <= 1.0) & (distance >= 0.55)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.8
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 0.95)
    if shape == "triangle":
        return (v <= 0.75) & (abs(u) <= (v + 1.0) * 0.55)
    if shape == "star":
        # A five-pointed star: the radius of its outline falls linearly between tip and notch in the angle's fifth.
        angle = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5 + 0.5) % 1.0 - 0.5) * 2
        tip, notch = 1.0, 0.42
        half = np.pi / 5
        # The outline between (tip, 0) and (notch, half) is a straight line, in polar coordinates.
        theta = angle * half
        numerator = tip * notch * np.sin(half)
        return distance <= numerator / (notch * np.sin(half - theta) + tip * np.sin(theta))
    raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")


def _render(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> tuple[np.ndarray, np.ndarray]:
    canvas = _background(rng)
    side = IMAGE_SIZE * _SUPERSAMPLING
    centers = (np.arange(side, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    masks = []
    for thing in objects:
        u = (centers[None, :] - thing.x) / thing.radius
        v = (centers[:, None] - thing.y) / thing.radius
        u, v = np.broadcast_arrays(u, v)
        fine = _inside(thing.shape, u, v).astype(np.float32)
        coverage = fine.reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, _SUPERSAMPLING).mean(axis=(1, 3))
        paint = np.array(COLORS[thing.color], np.float32) + rng.uniform(-10, 10, size=3)
        canvas = canvas * (1 - coverage[..., None]) + paint * coverage[..., None]
        masks.append(coverage >= 0.5)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), np.stack(masks)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey texture, float [64, 64, 3]: stripes, dots, a checkerboard or clouds, of low contrast."""
    x, y = np.meshgrid(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE))
    kind = rng.choice(["stripes", "dots", "checks", "clouds"])
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(7, 14)
    along = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
    across = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period
    if kind == "stripes":
        pattern = np.sin(along)
    elif kind == "dots":
        pattern = np.cos(along) * np.cos(across)
    elif kind == "checks":
        pattern = np.tanh(3 * np.sin(along) * np.sin(across))
    else:
        coarse = Image.fromarray(rng.uniform(-1.5, 1.5, size=(6, 6)).astype(np.float32))
        pattern = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    grey = rng.uniform(70, 130) + rng.uniform(6, 18) * pattern
    tint = rng.uniform(-8, 8, size=3)
    return (grey[..., None] + tint).astype(np.float32)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


class _Sentence:
    """Builds a caption while remembering where the words that name objects stand."""

    def __init__(self) -> None:
        self.text = ""
        self.referents: list[Referent] = []

    def add(self, text: str) -> None:
        self.text += text

    def add_object(self, thing: SceneObject, index: int, with_size: bool) -> None:
        words = [("size", thing.size)] if with_size else []
        words += [("color", thing.color), ("shape", thing.shape)]
        article = _article(words[0][1])
        self.add(article.capitalize() if not self.text else article)
        for kind, word in words:
            start = len(self.text) + 1
            self.add(f" {word}")
            self.referents.append(Referent(start, start + len(word), kind, index))


def _describe(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> tuple[str, tuple[Referent, ...]]:
    order = [int(i) for i in rng.permutation(len(objects))]
    with_size = [bool(b) for b in rng.random(len(objects)) < 0.5]
    sentence = _Sentence()
    if len(objects) == 2 and rng.random() < 0.5:
        first, second = order
        sentence.add_object(objects[first], first, with_size[first])
        sentence.add(f" {_relation(objects[first], objects[second])} ")
        sentence.add_object(objects[second], second, with_size[second])
    else:
        for place, index in enumerate(order):
            if place:
                sentence.add(" and " if place == len(order) - 1 else ", ")
            sentence.add_object(objects[index], index, with_size[index])
    sentence.add(".")
    return sentence.text, tuple(sentence.referents)


def _relation(first: SceneObject, second: SceneObject) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


def _ask(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> tuple[Question, ...]:
    """One question of each type that the scene allows (position needs two objects); yes and no equally often."""
    thing = objects[int(rng.integers(len(objects)))]
    questions = [
        Question("color", f"What color is the {thing.shape}?", thing.color),
        Question("shape", f"What shape is the {thing.color} object?", thing.shape),
        Question("count", "How many objects are there?", NUMBERS[len(objects)]),
    ]
    if rng.random() < 0.5:
        present, name = [o.color for o in objects], "{} object"
        every: list[str] = list(COLORS)
    else:
        present, name = [o.shape for o in objects], "{}"
        every = list(SHAPES)
    truth = bool(rng.random() < 0.5)
    word = str(rng.choice(present if truth else [w for w in every if w not in present]))
    noun = name.format(word)
    questions.append(Question("existence", f"Is there {_article(noun)} {noun}?", "yes" if truth else "no"))
    if len(objects) > 1:
        first, second = (objects[int(i)] for i in rng.permutation(len(objects))[:2])
        relation = _relation(first, second)
        truth = bool(rng.random() < 0.5)
        if not truth:
            relation = _relation(second, first)
        text = f"Is the {first.shape} {relation} the {second.shape}?"
        questions.append(Question("position", text, "yes" if truth else "no"))
    return tuple(questions)
