"""Scenes with truth: pictures of 3 to 6 things, and questions whose answers and premises can be computed.

    scene = draw_scene(random.Random(0), COMBINATIONS)
    picture = draw_picture(scene)
    facts = draw_facts(scene, random.Random(0), 6)
    facts[0].turns["referring", "open"]       # ("what color is the large circle left of the red square?", "blue")
    parse("is the first thing red?").check(scene)

A fact is about one or two things of a scene. It is asked in four ways, which are the corners of two knobs:

    what the question tells     "referring": its phrases are true of the picture and name one thing of it
                                "generic": it names things by their number in reading order, which fits every picture
    what the answer tells       "open" or "yes/no"

This module is not a benchmark. `python -m benchmarks.scenes` runs the study.
"""

import math
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import product

from PIL import Image, ImageDraw


COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50),
    "purple": (150, 50, 190), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 5, "large": 9}
ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLOURS), "shape": SHAPES}
ALL_COMBINATIONS = list(product(COLOURS, SHAPES))
# One combination of each colour. Only test pictures show them.
HELD_OUT = [(colour, SHAPES[number % len(SHAPES)]) for number, colour in enumerate(COLOURS)]
COMBINATIONS = [each for each in ALL_COMBINATIONS if each not in HELD_OUT]
PICTURE_SIZE, GRID = 64, 3
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
ORDINALS = {"first": 0, "second": 1, "third": 2, "last": -1}
DIRECTIONS = ("left of", "right of", "above", "below")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CORNERS = tuple(product(("generic", "referring"), ("yes/no", "open")))
KINDS = ("attribute", "count", "comparison", "relation", "existence")


@dataclass(frozen=True)
class Thing:
    """A thing in a cell of the grid. `shift` moves it by some pixels."""

    size: str
    color: str
    shape: str
    row: int
    column: int
    shift: tuple[int, int] = (0, 0)

    def is_beside(self, other: "Thing", direction: str) -> bool:
        return {
            "left of": self.column < other.column,
            "right of": self.column > other.column,
            "above": self.row < other.row,
            "below": self.row > other.row,
        }[direction]


Scene = tuple[Thing, ...]  # in reading order


def draw_scene(draw: random.Random, combinations: list[tuple[str, str]]) -> Scene:
    """Draws 3 to 6 things in different cells, with these combinations of colour and shape."""
    cells = sorted(draw.sample(list(product(range(GRID), range(GRID))), draw.randint(3, 6)))
    return tuple(
        Thing(draw.choice(list(SIZES)), *draw.choice(combinations), *cell, (draw.randint(-2, 2), draw.randint(-2, 2)))
        for cell in cells
    )


def draw_picture(scene: Scene) -> Image.Image:
    """Draws the scene on grey, 64 x 64 pixels."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (110, 110, 110))
    canvas = ImageDraw.Draw(picture)
    for thing in scene:
        x, y = (
            round((place + 0.5) * PICTURE_SIZE / GRID) + shift
            for place, shift in zip((thing.column, thing.row), thing.shift)
        )
        r, fill = SIZES[thing.size], COLOURS[thing.color]
        if thing.shape == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill)
        elif thing.shape == "square":
            canvas.rectangle((x - r, y - r, x + r, y + r), fill)
        elif thing.shape == "triangle":
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            canvas.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
            canvas.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return picture


def write_scene(scene: Scene) -> str:
    """The scene in words: `top left small red circle bottom center large ...`."""
    return " ".join(
        f"{ROWS[thing.row]} {COLUMNS[thing.column]} {thing.size} {thing.color} {thing.shape}" for thing in scene
    )


def caption(scene: Scene, draw: random.Random) -> str:
    """A short caption: two things, without their sizes and places."""
    return " and ".join(f"a {thing.color} {thing.shape}" for thing in draw.sample(scene, 2))


def word_list(scene: Scene, draw: random.Random, number: int = 10) -> str:
    """Pairs of attributes, half of which one thing has: `small red? yes blue cross? no ...`."""
    items = []
    for _ in range(number):
        names = draw.sample(list(ATTRIBUTES), 2)
        thing = draw.choice(scene)
        words = [getattr(thing, name) for name in names]
        if draw.random() < 0.5:
            words = [draw.choice(ATTRIBUTES[name]) for name in names]
        items.append(f"{words[0]} {words[1]}? {_yes(bool(_described(' '.join(words), scene)))}")
    return " ".join(items)


# --- Phrases: which things does a phrase name? ---

SIMPLE = rf"the (?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|thing)"
ORDINAL = rf"the (?:{'|'.join(ORDINALS)}) thing"
NAME = rf"(?:{ORDINAL}|{SIMPLE})"
PHRASE = rf"(?:{ORDINAL}|{SIMPLE}(?: (?:{'|'.join(DIRECTIONS)}) {SIMPLE})?)"
DIRECTION = rf"({'|'.join(DIRECTIONS)})"


def resolve(phrase: str, scene: Scene) -> Thing | None:
    """The thing that the phrase names, or `None` if it names none or several."""
    if phrase.split()[1] in ORDINALS:
        return scene[ORDINALS[phrase.split()[1]]]
    direction = next((each for each in DIRECTIONS if each in phrase), None)
    if direction is None:
        things = _described(phrase, scene)
    else:
        head, anchor = phrase.split(f" {direction} ")
        other = resolve(anchor, scene)
        things = [t for t in _described(head, scene) if other is not None and t.is_beside(other, direction)]
    return things[0] if len(things) == 1 else None


def _described(head: str, scene: Scene) -> list[Thing]:
    words = set(head.split()) - {"the", "thing"}
    return [thing for thing in scene if words <= {thing.size, thing.color, thing.shape}]


def draw_phrase(thing: Thing, scene: Scene, hidden: str | None, simple: bool, draw: random.Random) -> str | None:
    """Draws a phrase that names only `thing` and does not tell the attribute `hidden`; `None` if there is none."""
    phrases = [phrase for phrase in _heads(thing, hidden) if resolve(phrase, scene) == thing]
    if not simple and (not phrases or draw.random() < 0.25):
        anchor = draw.choice([other for other in scene if other != thing])
        others = [phrase for phrase in _heads(anchor, None) if resolve(phrase, scene) == anchor]
        longer = [f"{h} {d} {o}" for h, d, o in product(_heads(thing, hidden), DIRECTIONS, others)]
        phrases = [phrase for phrase in longer if resolve(phrase, scene) == thing] or phrases
    return draw.choice(phrases) if phrases else None


def _heads(thing: Thing, hidden: str | None) -> list[str]:
    """The phrases that describe a thing by at least one of its attributes."""
    choices = [("",) if name == hidden else ("", getattr(thing, name)) for name in ("size", "color", "shape")]
    heads = [(size, color, shape or "thing") for size, color, shape in product(*choices)]
    return [" ".join(["the", *filter(None, words)]) for words in heads if words != ("", "", "thing")]


# --- Questions: the forms, and the answer of each ---


@dataclass(frozen=True)
class Question:
    """A question in one of the `FORMS`."""

    form: str
    parts: tuple[str, ...]

    def answer(self, scene: Scene) -> str | None:
        """The answer, or `None` if a phrase does not name one thing, or no answer fits."""
        phrases = {part: resolve(part, scene) for part in self.parts if part.startswith("the ")}
        if None in phrases.values():
            return None
        return FORMS[self.form][2](scene, *(phrases.get(part, part) for part in self.parts))

    def premise_is_true(self, scene: Scene) -> bool:
        return all(resolve(part, scene) is not None for part in self.parts if part.startswith("the "))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _sharing(scene: Scene, attribute: str, thing: Thing) -> str:
    return str(sum(getattr(other, attribute) == getattr(thing, attribute) for other in scene))


def _size_beside(one: Thing, other: Thing) -> str:
    difference = SIZES[one.size] - SIZES[other.size]
    return "equal" if difference == 0 else "larger" if difference > 0 else "smaller"


def _direction(one: Thing, other: Thing) -> str | None:
    across, down = one.column - other.column, one.row - other.row
    if abs(across) == abs(down):
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _number(scene: Scene, color: str, shape: str) -> int:
    return sum((thing.color, thing.shape) == (color, shape) for thing in scene)


ATTRIBUTE_WORD = rf"({'|'.join([*SIZES, *COLOURS, *(f'a {shape}' for shape in SHAPES)])})"
COLOUR_WORD, SHAPE_WORD = rf"({'|'.join(COLOURS)})", rf"({'|'.join(SHAPES)})"
# Name -> how it is written, the pattern of its text, and its answer.
FORMS = {
    "attribute, open": (
        "what {} is {}?", rf"what (color|shape|size) is ({PHRASE})\?", lambda s, name, thing: getattr(thing, name),
    ),
    "attribute, yes/no": (
        "is {} {}?", rf"is ({PHRASE}) {ATTRIBUTE_WORD}\?",
        lambda s, thing, word: _yes(word.removeprefix("a ") in (thing.size, thing.color, thing.shape)),
    ),
    "count, open": ("how many share the {} of {}?", rf"how many share the (color|shape) of ({PHRASE})\?", _sharing),
    "count, yes/no": (
        "do {} share the {} of {}?", rf"do (\d) share the (color|shape) of ({PHRASE})\?",
        lambda s, number, name, thing: _yes(_sharing(s, name, thing) == number),
    ),
    "comparison, open": (
        "how large is {} next to {}?", rf"how large is ({NAME}) next to ({NAME})\?",
        lambda s, one, other: _size_beside(one, other),
    ),
    "comparison, yes/no": (
        "is {} {} than {}?", rf"is ({NAME}) (larger|smaller) than ({NAME})\?",
        lambda s, one, word, other: _yes(_size_beside(one, other) == word),
    ),
    "relation, open": (
        "where is {} from {}?", rf"where is ({NAME}) from ({NAME})\?", lambda s, one, other: _direction(one, other),
    ),
    "relation, yes/no": (
        "is {} {} {}?", rf"is ({NAME}) {DIRECTION} ({NAME})\?",
        lambda s, one, direction, other: _yes(one.is_beside(other, direction)),
    ),
    "existence, open": (
        "how often is there a {} {}?", rf"how often is there a {COLOUR_WORD} {SHAPE_WORD}\?",
        lambda s, color, shape: str(_number(s, color, shape)),
    ),
    "existence, yes/no": (
        "is there a {} {}?", rf"is there a {COLOUR_WORD} {SHAPE_WORD}\?",
        lambda s, color, shape: _yes(_number(s, color, shape) > 0),
    ),
}  # fmt: skip


def ask(form: str, *parts: str) -> tuple[str, Question]:
    """A question in words and as a program."""
    return FORMS[form][0].format(*parts), Question(form, parts)


@cache
def parse(text: str) -> Question | None:
    """The question that a text asks, or `None` if it has none of the `FORMS`."""
    for form, (_, pattern, _) in FORMS.items():
        found = re.fullmatch(pattern, text)
        if found:
            return Question(form, found.groups())
    return None


class Bits:
    """What questions and answers tell about a picture, measured by how many scenes of a set they rule out."""

    def __init__(self, scenes: list[Scene]):
        self.scenes = scenes
        self._answers = cache(lambda question: [question.answer(scene) for scene in scenes])

    def of_question(self, question: Question) -> float:
        """-log2 of the share of the scenes in which the question can be answered."""
        fitting = sum(answer is not None for answer in self._answers(question))
        return -math.log2(max(fitting, 1) / len(self.scenes))

    def of_answer(self, question: Question, answer: str) -> float:
        """-log2 of the share of the scenes with this answer, among those in which the question can be answered."""
        answers = [other for other in self._answers(question) if other is not None]
        return -math.log2(max(answers.count(answer), 1) / max(len(answers), 1))


# --- Facts: what is asked about, in the four corners ---


@dataclass(frozen=True)
class Fact:
    """
    turns: The question and the answer in each of the `CORNERS`.
    combinations: Colour and shape of the things that it is about.
    """

    kind: str
    turns: dict[tuple[str, str], tuple[str, str]]
    combinations: tuple[tuple[str, str], ...]


def draw_facts(scene: Scene, draw: random.Random, number: int, kinds: tuple[str, ...] = KINDS) -> list[Fact]:
    """Draws different facts. All kinds are equally frequent, as far as the scene has them."""
    facts: dict[tuple, Fact] = {}
    for _ in range(10 * number):
        kind = draw.choice(kinds)
        fact = next(filter(None, (_DRAWS[kind](scene, draw) for _ in range(5))), None)
        if fact is not None:
            facts.setdefault(tuple(fact.turns.values()), fact)
        if len(facts) == number:
            break
    return list(facts.values())


def _named(scene: Scene, draw: random.Random, hidden: str | None, number: int):
    """Draws things, each with its generic and its referring phrase; `None` if one of them cannot be referred to."""
    ordinals = draw.sample(list(ORDINALS), number)
    things = [scene[ORDINALS[ordinal]] for ordinal in ordinals]
    if len(set(things)) < number:
        return None
    phrases = [draw_phrase(thing, scene, hidden, number > 1, draw) for thing in things]
    if None in phrases:
        return None
    return things, {"generic": [f"the {ordinal} thing" for ordinal in ordinals], "referring": phrases}


def _fact(kind: str, scene: Scene, things: list[Thing], parts_of: dict[tuple[str, str], tuple]) -> Fact | None:
    turns = {}
    for corner, parts in parts_of.items():
        text, question = ask(f"{kind}, {corner[1]}", *parts)
        turns[corner] = (text, question.answer(scene))
    if any(answer is None for _, answer in turns.values()):
        return None
    return Fact(kind, turns, tuple((thing.color, thing.shape) for thing in things))


def _other(draw: random.Random, value: str, values) -> str:
    """The value itself in half of the cases, else another."""
    return value if draw.random() < 0.5 else draw.choice([other for other in values if other != value])


def _draw_attribute(scene: Scene, draw: random.Random) -> Fact | None:
    name = draw.choice(list(ATTRIBUTES))
    if (named := _named(scene, draw, name, 1)) is None:
        return None
    [thing], phrases = named
    word = ("a " if name == "shape" else "") + _other(draw, getattr(thing, name), ATTRIBUTES[name])
    parts = {(knob, "open"): (name, phrase) for knob, [phrase] in phrases.items()}
    return _fact("attribute", scene, [thing], parts | {(k, "yes/no"): (p, word) for k, [p] in phrases.items()})


def _draw_count(scene: Scene, draw: random.Random) -> Fact | None:
    name = draw.choice(("color", "shape"))
    if (named := _named(scene, draw, None, 1)) is None:
        return None
    [thing], phrases = named
    number = _other(draw, _sharing(scene, name, thing), "123")
    parts = {(knob, "open"): (name, phrase) for knob, [phrase] in phrases.items()}
    return _fact("count", scene, [thing], parts | {(k, "yes/no"): (number, name, p) for k, [p] in phrases.items()})


def _draw_comparison(scene: Scene, draw: random.Random) -> Fact | None:
    if (named := _named(scene, draw, "size", 2)) is None:
        return None
    things, phrases = named
    right = _size_beside(*things)
    if right == "equal" and draw.random() < 0.7:  # else most answers would be "no"
        return None
    word = right if right != "equal" and draw.random() < 0.5 else draw.choice(("larger", "smaller"))
    parts = {(knob, "open"): tuple(pair) for knob, pair in phrases.items()}
    parts |= {(knob, "yes/no"): (one, word, other) for knob, (one, other) in phrases.items()}
    return _fact("comparison", scene, things, parts)


def _draw_relation(scene: Scene, draw: random.Random) -> Fact | None:
    if (named := _named(scene, draw, None, 2)) is None:
        return None
    things, phrases = named
    right = next((d for d in DIRECTIONS if d.split()[0] == _direction(*things)), None)
    if right is None:
        return None
    direction = right if draw.random() < 0.5 else OPPOSITES[right]
    parts = {(knob, "open"): tuple(pair) for knob, pair in phrases.items()}
    parts |= {(knob, "yes/no"): (one, direction, other) for knob, (one, other) in phrases.items()}
    return _fact("relation", scene, things, parts)


def _draw_existence(scene: Scene, draw: random.Random) -> Fact:
    """Asks for a thing that is there in half of the cases. It is the same question on both sides of the first knob."""
    shown = {(thing.color, thing.shape) for thing in scene}
    known = HELD_OUT if shown & set(HELD_OUT) else COMBINATIONS
    absent = [each for each in known if each not in shown]
    combination = draw.choice(sorted(shown)) if draw.random() < 0.5 or not absent else draw.choice(absent)
    return _fact("existence", scene, [Thing("small", *combination, 0, 0)], dict.fromkeys(CORNERS, combination))


_DRAWS = {
    "attribute": _draw_attribute, "count": _draw_count, "comparison": _draw_comparison,
    "relation": _draw_relation, "existence": _draw_existence,
}  # fmt: skip
