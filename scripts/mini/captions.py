"""The words for a scene: a phrase, a sentence, or a paragraph as Wan's own prompts are written."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Literal, TypeAlias, get_args

from scripts.mini.world import Scene

Style: TypeAlias = Literal["phrase", "sentence", "paragraph"]
STYLES: tuple[Style, ...] = get_args(Style)

Words: TypeAlias = Mapping[str, Sequence[str]]

COLOUR: Words = {
    "red": ("red", "red", "bright red", "crimson", "scarlet"),
    "green": ("green", "green", "bright green", "emerald"),
    "blue": ("blue", "blue", "deep blue", "azure", "cobalt"),
    "yellow": ("yellow", "yellow", "bright yellow", "golden", "lemon"),
}
SHAPE: Words = {
    "circle": ("circle", "circle", "disc", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "three sided shape"),
}
WAY: Words = {
    "left": (
        *("left", "to the left", "to the left", "leftward", "leftwards"),
        *("toward the left", "towards the left", "from right to left"),
    ),
    "right": (
        *("right", "to the right", "to the right", "rightward", "rightwards"),
        *("toward the right", "towards the right", "from left to right"),
    ),
    "up": ("up", "upward", "upwards", "to the top", "toward the top", "from bottom to top"),
    "down": ("down", "downward", "downwards", "to the bottom", "toward the bottom", "from top to bottom"),
}
VERB: Words = {  # present, and with -ing
    "left": ("moves", "goes", "drifts", "glides", "slides", "travels", "floats"),
    "right": ("moves", "goes", "drifts", "glides", "slides", "travels", "floats"),
    "up": ("moves", "goes", "drifts", "glides", "slides", "travels", "floats", "rises", "climbs"),
    "down": ("moves", "goes", "drifts", "glides", "slides", "travels", "floats", "falls", "sinks"),
}
ING = {
    "moves": "moving",
    "goes": "going",
    "drifts": "drifting",
    "glides": "gliding",
    "slides": "sliding",
    "travels": "travelling",
    "floats": "floating",
    "rises": "rising",
    "climbs": "climbing",
    "falls": "falling",
    "sinks": "sinking",
}
PLACE: Words = {
    "white": ("a white background", "a plain white background", "a white backdrop", "pure white"),
    "black": ("a black background", "a plain black background", "a black backdrop", "pure black"),
    "grey": ("a grey background", "a plain grey background", "a gray backdrop", "a gray background"),
    "striped": (
        *("a striped background", "dark stripes", "vertical stripes", "a striped backdrop"),
        *("a background of stripes", "stripes"),
    ),
}
ON = ("on", "over", "across", "against", "in front of")
HOW = ("", "", "", "slowly", "smoothly", "steadily", "gently")
TEMPLATES: Mapping[Style, Sequence[str]] = {
    "phrase": (
        "{colour} {shape} {ing} {way}, {place}",
        "{colour} {shape} {ing} {way} {on} {place}",
        "a {colour} {shape}, {ing} {way}, {on} {place}",
        "{place}, {colour} {shape} {ing} {way}",
        "{colour} {shape}, {place}, {ing} {way}",
    ),
    "sentence": (
        "A {colour} {shape} {verb} {how} {way} {on} {place}.",
        "A {colour} {shape} is {ing} {how} {way} {on} {place}.",
        "{on} {place}, a {colour} {shape} {verb} {how} {way}.",
        "The video shows a {colour} {shape} that {verb} {how} {way} {on} {place}.",
        "There is a {colour} {shape} {on} {place}, {ing} {how} {way}.",
    ),
    "paragraph": (
        "A {colour} {shape} {verb} {how} {way}. The background is {place}. {end}",
        "A simple animation of a {colour} {shape} {on} {place}. The {shape2} {verb} {how} {way}. {end}",
        "The scene shows {place}. In the frame, a {colour} {shape} {verb} {how} {way}. {end}",
        "{end} A {colour} {shape} {verb} {how} {way} {on} {place}.",
    ),
}
ENDS = (
    "The camera is still and the edges are clean.",
    "The camera does not move, and the light is even.",
    "Clean flat animation with soft edges, still camera.",
    "Minimal style, calm and even motion.",
    "The motion is calm and the colours are clear.",
)


def caption(scene: Scene, rng: random.Random, style: Style) -> str:
    """A text that names colour, shape, direction and background of the scene, in the words of the grammar."""
    verb = rng.choice(VERB[scene.direction])
    text = rng.choice(TEMPLATES[style]).format(
        colour=rng.choice(COLOUR[scene.colour]),
        shape=rng.choice(SHAPE[scene.shape]),
        shape2=rng.choice(("shape", scene.shape)),
        verb=verb,
        ing=ING[verb],
        way=rng.choice(WAY[scene.direction]),
        place=rng.choice(PLACE[scene.background]),
        on=rng.choice(ON),
        how=rng.choice(HOW),
        end=rng.choice(ENDS),
    )
    text = " ".join(text.split())
    return text if style == "phrase" else text[0].upper() + text[1:]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in lower case, without punctuation."""
    words = {word.strip(",.").lower() for text in _fragments() for word in text.split()}
    return sorted(words - {""})


def _fragments() -> Iterator[str]:
    for table in (COLOUR, SHAPE, WAY, VERB, PLACE):
        for choices in table.values():
            yield from choices
    yield from (*ING.values(), *ON, *HOW, *ENDS, "shape")
    for templates in TEMPLATES.values():
        for template in templates:
            yield "".join(literal for literal, *_ in Formatter().parse(template))
