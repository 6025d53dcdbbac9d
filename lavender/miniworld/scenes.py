"""A small world of pictures whose every word has an exact mask.

A scene holds one to three flat-colored shapes on a textured grey background, 64x64 pixels. Within a scene no two shapes share
a color or a form, so each color word and each shape word of a caption names exactly one object. Everything about scene number
`index` follows from `(seed, index)` alone: the same two integers give the same picture, caption and questions on any machine.
A `World` draws other scenes: more or smaller objects, some pairs of color and shape, noise, other backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ..errors import ConfigError

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
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
QUESTION_TYPES = ("color", "shape", "count", "existence", "position")
"""The types of a scene's own questions."""
STUDY_TYPES = (*QUESTION_TYPES, "place")
"""The types of `ask_all`."""
DESCRIBE = "Describe the picture."
MEASURED_KINDS = ("color", "shape")
"""Kinds of caption words that localization is measured on: a size word may fit several objects."""

_SUPERSAMPLING = 4
_MARGIN = 2.0
_MOST_OBJECTS = 5
_MOST_TRIES = 10_000
"""How often the objects of a scene are placed anew."""

Size = Literal["small", "large"]
Pairs = Literal["all", "common", "rare"]
Background = Literal["stripes", "dots", "checks", "clouds", "rings", "slopes"]


@dataclass(frozen=True)
class World:
    """What scenes are drawn from.

    Attributes:
        counts: numbers of objects, at most five.
        shares: how often each of these is drawn; they sum to one.
        radii: by size word the range of the radius of the circle around a shape, in pixels.
        pairs: which pairs of a color and a shape there are: `"all"`, or those that `is_rare` says are not, or are.
        noise: standard deviation of the noise on every pixel's channels, of 255.
        backgrounds: the textures.
        cue: how often the background is tinted after the first object's color, in [0, 1]; else it is tinted after a color that no
            object has. None tints at random, whatever the colors.

    Raises `ConfigError` naming the first of these that cannot be.
    """

    counts: tuple[int, ...] = (1, 2, 3)
    shares: tuple[float, ...] = (0.2, 0.4, 0.4)
    radii: tuple[tuple[Size, tuple[float, float]], ...] = (("small", (7.0, 9.0)), ("large", (11.0, 14.0)))
    pairs: Pairs = "all"
    noise: float = 0.0
    backgrounds: tuple[Background, ...] = ("stripes", "dots", "checks", "clouds")
    cue: float | None = None

    def __post_init__(self) -> None:
        for name, is_sound, expected in (
            ("counts", _are(self.counts, Integral, 1, _MOST_OBJECTS), f"some integers from 1 to {_MOST_OBJECTS}"),
            (
                "shares",
                _are(self.counts, Integral, 1, _MOST_OBJECTS)
                and _are(self.shares, Real, 0, 1)
                and len(self.shares) == len(self.counts)
                and abs(sum(self.shares) - 1) < 1e-8,
                f"as many numbers as counts is {self.counts!r}, that sum to one",
            ),
            ("radii", _are_radii(self.radii), f"pairs of small or large and a range of radii that fit into {IMAGE_SIZE} pixels"),
            ("pairs", self.pairs in get_args(Pairs), f"one of {', '.join(get_args(Pairs))}"),
            ("noise", _are((self.noise,), Real, 0, 255), "a number from 0 to 255"),
            (
                "backgrounds",
                isinstance(self.backgrounds, list | tuple)
                and len(self.backgrounds)
                and all(kind in get_args(Background) for kind in self.backgrounds),
                f"some of {', '.join(get_args(Background))}",
            ),
            ("cue", self.cue is None or _are((self.cue,), Real, 0, 1), "a share in [0, 1], or None"),
        ):
            if not is_sound:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def allows(self, shape: str, color: str) -> bool:
        """Whether a shape may have a color."""
        return self.pairs == "all" or is_rare(shape, color) == (self.pairs == "rare")


def _are(values: Any, kind: type, low: float, high: float) -> bool:
    """Whether these are numbers of a range, at least one."""
    return (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high for value in values)  # type: ignore[operator]
    )


def _are_radii(radii: Any) -> bool:
    """Whether these are ranges by size, whose circles have room."""
    try:
        sizes, ranges = zip(*radii, strict=True)
        fit = all(_are(ends, Real, 1, IMAGE_SIZE / 2 - _MARGIN) and len(ends) == 2 and ends[0] <= ends[1] for ends in ranges)
        return fit and {*sizes} <= {*get_args(Size)} and len({*sizes}) == len(sizes)
    except (TypeError, ValueError):
        return False


_CUE = 20.0
"""How strongly a cue tints: the shift of a channel, of 255, that stands out from the color's mean by 100."""


def is_rare(shape: str, color: str) -> bool:
    """Whether a pair is one of the quarter that worlds of common pairs keep back; every shape and every color has some."""
    return (SHAPES.index(shape) + list(COLORS).index(color)) % 4 == 0


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
    """A question about a scene.

    Attributes:
        type: one of `STUDY_TYPES`.
        text: what is asked.
        answer: lower-case words, one but for places.
        referents: the words of the text that name an object of the scene.
        object_index: the object that the answer is about; None where it is about none, or about several.
    """

    type: str
    text: str
    answer: str
    referents: tuple[Referent, ...] = ()
    object_index: int | None = None


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


def make_scene(seed: int, index: int, world: World | None = None) -> Scene:
    """Scene number `index` of the world with this `seed` (both non-negative).

    Raises `ConfigError` if as many objects as the world has find no room.
    """
    world = world or World()
    rng = np.random.default_rng([seed, index])
    objects = _place_objects(rng, world)
    pixels, masks = _render(rng, objects, world)
    caption, referents = _describe(rng, objects)
    questions = _ask(rng, objects)
    if world.noise:
        pixels = np.clip(np.rint(pixels + rng.normal(0, world.noise, pixels.shape)), 0, 255).astype(np.uint8)
    return Scene(objects, pixels, masks, caption, referents, questions)


def make_scenes(seed: int, count: int, start: int = 0, world: World | None = None) -> Iterator[Scene]:
    """Scenes `start`, ..., `start + count - 1` of the world with this `seed`."""
    return (make_scene(seed, index, world) for index in range(start, start + count))


def _place_objects(rng: np.random.Generator, world: World) -> tuple[SceneObject, ...]:
    count = int(rng.choice(world.counts, p=world.shares))
    while True:
        shapes = [str(shape) for shape in rng.permutation(SHAPES)[:count]]
        colors = [str(color) for color in rng.permutation(list(COLORS))[:count]]
        if all(map(world.allows, shapes, colors)):
            break
    radii = dict(world.radii)
    for _ in range(_MOST_TRIES):
        sizes = [str(rng.choice(list(radii))) for _ in range(count)]
        placed: list[SceneObject] = []
        for shape, color, size in zip(shapes, colors, sizes, strict=True):
            radius = float(rng.uniform(*radii[size]))  # type: ignore[index]
            low, high = radius + _MARGIN, IMAGE_SIZE - radius - _MARGIN
            for _ in range(20):
                x, y = (float(v) for v in rng.uniform(low, high, size=2))
                if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + _MARGIN for o in placed):
                    placed.append(SceneObject(shape, color, size, x, y, radius))
                    break
        if len(placed) == count:
            return tuple(placed)
    raise ConfigError(f"counts is {world.counts} and radii {world.radii}: {count} such objects find no room; give fewer or smaller")


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


def _render(rng: np.random.Generator, objects: tuple[SceneObject, ...], world: World) -> tuple[np.ndarray, np.ndarray]:
    canvas = _background(rng, world, objects)
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


def _background(rng: np.random.Generator, world: World, objects: tuple[SceneObject, ...]) -> np.ndarray:
    """A grey texture of low contrast, float [64, 64, 3]."""
    x, y = np.meshgrid(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE))
    kind = str(rng.choice(world.backgrounds))
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
    elif kind == "rings":
        pattern = np.sin(np.hypot(x - IMAGE_SIZE / 2, y - IMAGE_SIZE / 2) * 2 * np.pi / period)
    elif kind == "slopes":
        pattern = (x * np.cos(angle) + y * np.sin(angle)) / IMAGE_SIZE * 2 - 1
    else:
        coarse = Image.fromarray(rng.uniform(-1.5, 1.5, size=(6, 6)).astype(np.float32))
        pattern = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    grey = rng.uniform(70, 130) + rng.uniform(6, 18) * pattern
    tint = rng.uniform(-8, 8, size=3)
    if world.cue is not None:
        absent = [color for color in COLORS if all(color != thing.color for thing in objects)]
        color = objects[0].color if rng.random() < world.cue else str(rng.choice(absent))
        tint = _CUE * (np.array(COLORS[color]) - np.mean(COLORS[color]) + (0 if color != "white" else 40)) / 100
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


class _Asked:
    """Builds a question while remembering where the words that name objects stand."""

    def __init__(self) -> None:
        self.text = ""
        self.referents: list[Referent] = []

    def say(self, text: str) -> _Asked:
        self.text += text
        return self

    def name(self, kind: str, word: str, object_index: int | None) -> _Asked:
        if object_index is not None:
            self.referents.append(Referent(len(self.text), len(self.text) + len(word), kind, object_index))
        return self.say(word)

    def ends(self, type_: str, answer: str, object_index: int | None = None) -> Question:
        return Question(type_, self.text, answer, tuple(self.referents), object_index)


def _ask_color(objects: tuple[SceneObject, ...], i: int) -> Question:
    return _Asked().say("What color is the ").name("shape", objects[i].shape, i).say("?").ends("color", objects[i].color, i)


def _ask_shape(objects: tuple[SceneObject, ...], i: int) -> Question:
    return _Asked().say("What shape is the ").name("color", objects[i].color, i).say(" object?").ends("shape", objects[i].shape, i)


def _ask_count(objects: tuple[SceneObject, ...]) -> Question:
    return _Asked().say("How many objects are there?").ends("count", NUMBERS[len(objects)])


def _ask_existence(rng: np.random.Generator, objects: tuple[SceneObject, ...], truth: bool | None = None) -> Question:
    if rng.random() < 0.5:
        kind, present, every, tail = "color", [o.color for o in objects], list(COLORS), " object?"
    else:
        kind, present, every, tail = "shape", [o.shape for o in objects], list(SHAPES), "?"
    truth = bool(rng.random() < 0.5) if truth is None else truth
    word = str(rng.choice(present if truth else [w for w in every if w not in present]))
    named = present.index(word) if truth else None
    asked = _Asked().say(f"Is there {_article(word)} ").name(kind, word, named).say(tail)
    return asked.ends("existence", "yes" if truth else "no", named)


def _ask_position(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> Question:
    first, second = (int(i) for i in rng.permutation(len(objects))[:2])
    relation = _relation(objects[first], objects[second])
    truth = bool(rng.random() < 0.5)
    if not truth:
        relation = _relation(objects[second], objects[first])
    asked = _Asked().say("Is the ").name("shape", objects[first].shape, first).say(f" {relation} the ")
    return asked.name("shape", objects[second].shape, second).say("?").ends("position", "yes" if truth else "no")


def _ask_place(rng: np.random.Generator, objects: tuple[SceneObject, ...], i: int) -> Question:
    thing = objects[i]
    asked = _Asked().say("Where is the ")
    asked = asked.name("shape", thing.shape, i) if rng.random() < 0.5 else asked.name("color", thing.color, i).say(" object")
    place = f"{'top' if thing.y < IMAGE_SIZE / 2 else 'bottom'} {'left' if thing.x < IMAGE_SIZE / 2 else 'right'}"
    return asked.say("?").ends("place", place, i)


def _ask(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> tuple[Question, ...]:
    """One question of each type that the scene allows (position needs two objects); yes and no equally often."""
    i = int(rng.integers(len(objects)))
    questions = [_ask_color(objects, i), _ask_shape(objects, i), _ask_count(objects), _ask_existence(rng, objects)]
    if len(objects) > 1:
        questions.append(_ask_position(rng, objects))
    return tuple(questions)


def ask_all(scene: Scene, seed: int) -> tuple[Question, ...]:
    """Every question about a scene of the types in `STUDY_TYPES`: color, shape and place of each object, the count, one existence
    that holds and one that does not, and up to three positions.

    A place is a quarter of the picture; objects on the border between two, less than two pixels from it, are not asked for.
    `seed` chooses which, beside the objects; the scene's own questions are others.
    """
    objects = scene.objects
    rng = np.random.default_rng([seed, *(round(v * 1000) for o in objects for v in (o.x, o.y))])
    questions = [ask(objects, i) for i in range(len(objects)) for ask in (_ask_color, _ask_shape)]
    middle = IMAGE_SIZE / 2
    questions += [_ask_place(rng, objects, i) for i, o in enumerate(objects) if min(abs(o.x - middle), abs(o.y - middle)) > 2]
    questions.append(_ask_count(objects))
    questions += [_ask_existence(rng, objects, truth) for truth in (True, False)]
    if len(objects) > 1:
        asked = {question.text: question for question in (_ask_position(rng, objects) for _ in range(3))}
        questions += asked.values()
    return tuple(questions)
