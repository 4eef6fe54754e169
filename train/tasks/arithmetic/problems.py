"""Synthetic arithmetic in plain words: what the embedded model learns, and what the demo adapts.

A *fact* is an addition or a subtraction of whole numbers below 100, ``31+12=43``. The facts that
say the same of three numbers, ``31+12=43``, ``12+31=43``, ``43-12=31`` and ``43-31=12``, are a
*family*. About 12 % of the families are held out: no training problem of any kind uses one of
their facts, and every evaluation problem uses theirs alone. Which ones is a hash of the numbers, so
that it is the same on every machine and in every version.

Everything here is a pure function of its arguments; texts are lower-case, with a space before a
word or a number and none before punctuation.
"""

from __future__ import annotations

import functools
import hashlib
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ...data.batches import IGNORE

LARGEST = 99
HELD_OUT_PERCENT = 12


class Problem(NamedTuple):
    """A text in two parts: what is given, and what is to be answered.

    Attributes:
      prompt: ``31+12=``; empty where the whole text is to be learned.
      answer: ``43``.
      kind: name of the task that made it.
    """

    prompt: str
    answer: str
    kind: str

    @property
    def text(self) -> str:
        """The whole text."""
        separator = "" if not self.prompt or self.prompt.endswith("=") else " "
        return f"{self.prompt}{separator}{self.answer}"


class Fact(NamedTuple):
    """``first operator second = result``."""

    first: int
    operator: str
    second: int
    result: int

    def __str__(self) -> str:
        return f"{self.first}{self.operator}{self.second}={self.result}"

    @property
    def family(self) -> tuple[int, int]:
        """The two smaller of its three numbers, the smaller one first."""
        if self.operator == "+":
            return min(self.first, self.second), max(self.first, self.second)
        return min(self.result, self.second), max(self.result, self.second)


def held_out(family: tuple[int, int]) -> bool:
    """Whether a family is kept for evaluation.

    >>> held_out((12, 31)), held_out((1, 14))
    (True, False)
    """
    low, high = family
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


@functools.cache
def facts(held: bool) -> tuple[Fact, ...]:
    """All facts on one side of the split, additions and subtractions."""
    everything = [
        fact
        for first in range(1, LARGEST)
        for second in range(1, LARGEST + 1 - first)
        for fact in (
            Fact(first, "+", second, first + second),
            Fact(first + second, "-", second, first),
        )
    ]
    return tuple(fact for fact in everything if held_out(fact.family) == held)


@functools.cache
def _followers(held: bool) -> dict[tuple[int, str], tuple[Fact, ...]]:
    """The facts by their first number and operator."""
    found: dict[tuple[int, str], list[Fact]] = {}
    for fact in facts(held):
        found.setdefault((fact.first, fact.operator), []).append(fact)
    return {key: tuple(values) for key, values in found.items()}


def chain(rng: np.random.Generator, held: bool, operators: str) -> list[Fact]:
    """Facts that each begin with the last one's result.

    Args:
      rng: source of the draws.
      held: from the families held out, or from the others.
      operators: of each fact: ``+``, ``-``, or ``?`` for either.

    Returns:
      One fact for each operator.
    """
    while True:
        drawn: list[Fact] = []
        for operator in operators:
            operator = _pick(rng, "+-") if operator == "?" else operator
            if drawn:
                choices = _followers(held).get((drawn[-1].result, operator), ())
            else:
                choices = facts(held)
            # Sums near the largest number have nothing to be added to: begin again.
            if not choices:
                break
            fact = _pick(rng, choices)
            if fact.operator != operator:
                break
            drawn.append(fact)
        if len(drawn) == len(operators):
            return drawn


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


# --- words ----------------------------------------------------------------------------------------

FIELDS = {
    "name": (
        "anna ben clara david emma frank grace hugo iris jonas kira leo mia noah olga paul rosa "
        "sam tina victor"
    ).split(),
    "thing": (
        "apples balls books bottles boxes buttons candles cards coins cups eggs flowers hats keys "
        "lemons nuts pears pens plates shells spoons stamps stones tickets"
    ).split(),
    "holder": "bag basket box bucket cupboard drawer jar kitchen shop".split(),
    "more": "buys collects finds gets makes receives wins".split(),
    "less": "breaks drops hides loses sells sends uses".split(),
    "vehicle": "boat bus coach ferry lift plane train tram van".split(),
    "stop": (
        "bridge castle church factory farm forest harbour hotel lake library market museum park "
        "school station theatre"
    ).split(),
    "weather": "clear cold dark rainy sunny warm wet windy".split(),
    "colour": "black blue brown green grey red white yellow".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday".split(),
}

ADD = (
    ("{name} has {x} {thing}. {name} {more} {y} more.", "how many {thing} does {name} have?"),
    ("there are {x} {thing} in the {holder}. {name} puts in {y} more.",
     "how many {thing} are in the {holder}?"),
    ("{name} has {x} {thing} and {other} has {y}.", "how many {thing} do they have together?"),
)  # fmt: skip
TAKE = (
    ("{name} has {x} {thing}. {name} {less} {y}.", "how many {thing} does {name} have?"),
    ("there are {x} {thing} in the {holder}. {name} takes out {y}.",
     "how many {thing} are in the {holder}?"),
    ("{name} has {x} {thing} and gives {y} to {other}.", "how many {thing} does {name} have?"),
)  # fmt: skip
EQUATION = "what is the equation?"

SENTENCES = (
    "a {colour} {vehicle} carries people to the {stop}.",
    "the {vehicle} is at the {stop} now.",
    "on {day} many people are on the {vehicle}.",
    "people get on the {vehicle} at the {stop} and get off at the {place}.",
    "how many people are there? {x} people are at the {stop}.",
    "at the {stop} {x} get on.",
    "at the {stop} {x} get off.",
    "the {vehicle} to the {stop} carries {x} people on {day}.",
    "{name} and {other} are on a {vehicle}. they get off at the {stop}.",
    "{name} takes the {vehicle} to the {stop} and then the {ride} to the {place}.",
    "the {stop} is {colour} and the {place} is {other_colour}.",
    "on {day} it is {weather} at the {stop} and {other_weather} at the {place}.",
    "now it is {weather}. {name} waits for the {vehicle}.",
    "where is {name}? at the {stop}. where is {other}? on the {vehicle}.",
)
READING = (
    "{x} people are at the {a}, {y} at the {b} and {z} at the {c}. how many are at the {asked}?"
)
BACKWARDS = "{digits} backwards is {reversed}."
SPELLED = ("{digits} in words is {words}.", "{words} in digits is {digits}.")

RIDE = (
    "a {vehicle} carries {x} people. at the {stop} {y} get {one} and {z} get {two}. "
    "how many people are on the {vehicle} now?"
)

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(number: int) -> str:
    """A whole number below 100 in words.

    >>> spell(7), spell(40), spell(43)
    ('seven', 'forty', 'forty three')
    """
    if number < 20:
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return " ".join([_TENS[tens - 2], *([_UNITS[units]] if units else [])])


def _fill(rng: np.random.Generator, template: str, **given: object) -> str:
    """A template with its fields drawn; ``other`` and the like differ from their namesakes."""
    pairs = {"other": "name", "place": "stop", "ride": "vehicle",
             "other_colour": "colour", "other_weather": "weather"}  # fmt: skip
    values = dict(given)
    for _, field, _, _ in string.Formatter().parse(template):
        if field and field not in values:
            taken = values.get(pairs.get(field, ""))
            values[field] = _pick(rng, [w for w in FIELDS[pairs.get(field, field)] if w != taken])
    return template.format(**values)


# --- tasks: each makes one problem from a generator and a side of the split -----------------------


def equation(rng: np.random.Generator, held: bool) -> Problem:
    """A bare equation: ``31+12=``, ``43``."""
    return _bare(chain(rng, held, "?"), "equation")


def equations(rng: np.random.Generator, held: bool) -> Problem:
    """Two or three equations, each beginning with the last result: ``31+12=``, ``43, 43-8=35``."""
    return _bare(chain(rng, held, "?" * int(rng.integers(2, 4))), "equations")


def _bare(drawn: list[Fact], kind: str) -> Problem:
    prompt, answer = ", ".join(map(str, drawn)).split("=", 1)
    return Problem(f"{prompt}=", answer, kind)


def story(rng: np.random.Generator, held: bool) -> Problem:
    """A one-step word problem, answered by the number."""
    situation, question, fact = _story(rng, held)
    return Problem(f"{situation} {question}", str(fact.result), "story")


def story_equation(rng: np.random.Generator, held: bool) -> Problem:
    """A one-step word problem, answered by the equation."""
    situation, _, fact = _story(rng, held)
    return Problem(f"{situation} {EQUATION}", str(fact), "story_equation")


def _story(rng: np.random.Generator, held: bool) -> tuple[str, str, Fact]:
    (fact,) = chain(rng, held, "?")
    template = "|".join(_pick(rng, ADD if fact.operator == "+" else TAKE))
    situation, question = _fill(rng, template, x=fact.first, y=fact.second).split("|")
    return situation, question, fact


def sentence(rng: np.random.Generator, held: bool) -> Problem:
    """A plain sentence in the words of `ride`, with no problem in it."""
    text = _fill(rng, _pick(rng, SENTENCES), x=int(rng.integers(1, LARGEST + 1)))
    return Problem("", text, "sentence")


def reading(rng: np.random.Generator, held: bool) -> Problem:
    """A question whose answer is one of the numbers told."""
    numbers = [int(number) for number in rng.integers(1, LARGEST + 1, 3)]
    stops = [str(stop) for stop in rng.permutation(FIELDS["stop"])[:3]]
    which = int(rng.integers(3))
    prompt = READING.format(
        **dict(zip("xyzabc", [*numbers, *stops], strict=True)), asked=stops[which]
    )
    return Problem(prompt, str(numbers[which]), "reading")


def numeral(rng: np.random.Generator, held: bool) -> Problem:
    """A number backwards, or in words and back in digits."""
    number = int(rng.integers(1, LARGEST + 1))
    template = _pick(rng, (BACKWARDS, *SPELLED))
    fields = {"digits": str(number), "reversed": str(number)[::-1], "words": spell(number)}
    return Problem("", template.format(**fields), "numeral")


def ride(rng: np.random.Generator, held: bool) -> Problem:
    """A two-step problem in another wording, answered by two equations: the demo's task.

    >>> problem = ride(np.random.default_rng(0), held=False)
    >>> problem.prompt.startswith("a ") and problem.answer.count("=") == 2
    True
    """
    operators = _pick(rng, ("+-", "-+"))
    first, second = chain(rng, held, operators)
    words = ["on" if operator == "+" else "off" for operator in operators]
    prompt = _fill(
        rng, RIDE, x=first.first, y=first.second, z=second.second, one=words[0], two=words[1]
    )
    return Problem(prompt, f"{first}, {second}", "ride")


Task = Callable[[np.random.Generator, bool], Problem]

TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (equation, equations, story, story_equation, reading, sentence, numeral, ride)
}

# Percent of the pre-training texts. Problems of two steps build on equations that go on from the
# last result and on numbers found among others; no such problem is among these.
MIXTURE: dict[str, int] = {
    "equation": 16,
    "equations": 16,
    "story": 26,
    "story_equation": 14,
    "reading": 10,
    "sentence": 8,
    "numeral": 10,
}


def draw(tasks: str | dict[str, int], count: int, *, seed: int, held: bool) -> list[Problem]:
    """Draws problems.

    Args:
      tasks: one of `TASKS`, or names with their shares, as `MIXTURE`.
      count: how many.
      seed: of the draws.
      held: from the families held out (evaluation), or from the others (training).

    Returns:
      The problems; the first ones do not depend on how many are drawn.

    >>> draw("equation", 1, seed=0, held=True)[0].kind
    'equation'
    """
    shares = {tasks: 1} if isinstance(tasks, str) else tasks
    names = [name for name, share in shares.items() for _ in range(share)]
    rng = np.random.default_rng([seed, held])
    return [TASKS[_pick(rng, names)](rng, held) for _ in range(count)]


def correct(problem: Problem, answer: str) -> bool:
    """Whether an answer is the problem's, in every character; space around it does not count.

    A bare equation may go on to others after a comma, as those that were learned do.

    >>> correct(Problem("31+12=", "43", "equation"), "43, 43-8=35")
    True
    """
    if problem.kind == equation.__name__:
        answer = answer.split(",")[0]
    return answer.strip() == problem.answer


# --- tokens ---------------------------------------------------------------------------------------

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Special tokens, digits, signs, and every word of the templates, in alphabetic order."""
    templates = [text for pair in ADD + TAKE for text in pair]
    templates += [EQUATION, READING, *SENTENCES, BACKWARDS, *SPELLED, RIDE, "on off"]
    texts = [re.sub(r"{\w+}", " ", template) for template in templates]
    texts += [*_UNITS, *_TENS, *(word for words in FIELDS.values() for word in words)]
    words = sorted(set(re.findall("[a-z]+", " ".join(texts))))
    return (*SPECIAL, *string.digits, *"+-=,.?", *words)


def tokenizer() -> Tokenizer:
    """The tokenizer: one token for a word, a sign or a digit.

    Decoding puts the spaces back: ``31+12=43, 43-8=35``.

    >>> pieces = tokenizer().encode("Ben has 31 apples.").tokens
    >>> pieces
    ['<bos>', 'ben', 'has', '3', '1', 'apples', '.']
    """
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN)
    )
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[^a-z]"), "isolated")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9=+-]) (?=[0-9=+-])| (?=[.,?])"), ""),
        ]
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return made


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token numbers of texts, without special tokens."""
    return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def prompts(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[list[int]]:
    """What a model is given to answer: ``<bos> prompt``."""
    bos: Any = tokenizer.token_to_id(BOS)
    return [[bos, *ids] for ids in encode(tokenizer, [problem.prompt for problem in problems])]


def examples(
    problems: Sequence[Problem], tokenizer: Tokenizer, *, answers_alone: bool
) -> list[dict[str, np.ndarray]]:
    """Problems as rows for training: ``<bos> prompt answer <eos>``.

    Args:
      problems: what to learn.
      tokenizer: as `tokenizer` makes it.
      answers_alone: learn the answer and its end, not the prompt.

    Returns:
      For each problem ``tokens`` and ``labels``, the token after each, int32 of one length; what is
      not learned has the label -100.

    >>> problem = Problem("31+12=", "43", "equation")
    >>> (row,) = examples([problem], tokenizer(), answers_alone=True)
    >>> row["tokens"].tolist()
    [1, 7, 5, 14, 5, 6, 16, 8, 7]
    >>> row["labels"].tolist()
    [-100, -100, -100, -100, -100, -100, 8, 7, 2]
    """
    eos = tokenizer.token_to_id(EOS)
    asked = prompts(problems, tokenizer)
    answered = encode(tokenizer, [problem.answer for problem in problems])
    rows = []
    for prompt, answer in zip(asked, answered, strict=True):
        tokens = np.array([*prompt, *answer, eos], np.int32)
        labels = tokens[1:].copy()
        if answers_alone:
            labels[: len(prompt) - 1] = IGNORE
        rows.append({"tokens": tokens[:-1], "labels": labels})
    return rows
