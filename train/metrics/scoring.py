"""Which generations are correct: the same text, the last number, the first name."""

from __future__ import annotations

import decimal
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..errors import InputError

Score = Literal["none", "exact", "last-number", "first-match"]


def score(
    kind: Score, answers: Sequence[str], references: Sequence[str], choices: Sequence[str] = ()
) -> list[bool] | None:
    """Which answers are correct; answer and reference are read in one and the same way.

    Args:
      kind: ``exact``: the same text, but for space around it; ``last-number``: the last number of
        both is equal; ``first-match``: of all references and choices, the one that the answer names
        first is its own; ``none``: answers are not scored.
      answers: what was answered.
      references: the correct answers.
      choices: what an answer could name other than the references, for ``first-match``.

    Raises:
      InputError: a reference has no number, or is empty.

    >>> score("last-number", ["so 3 and 1,200.0 apples", "none"], ["#### 1200", "#### 3"])
    [True, False]
    >>> score("first-match", ["It is true, not false", "no idea"], ["true", "false"])
    [True, False]
    >>> score("first-match", ["It is a matter of taste: B"], ["B"], ["A", "B"])
    [True]
    """
    if kind == "none":
        return None
    read: Any = {"exact": _plain, "last-number": last_number}.get(kind)
    if kind == "first-match":
        read = _Names([*references, *choices])
    expected = [read(reference) for reference in references]
    if None in expected:
        raise InputError(
            f"--score {kind} finds nothing to compare with in"
            f" {references[expected.index(None)][:60]!r}: give another score, or --reference"
        )
    return [read(answer) == known for answer, known in zip(answers, expected, strict=True)]


def _plain(text: str) -> str:
    """A text as it is compared: one form of each letter and line break, no space around it."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip().strip("\ufeff\u200b")


# ---------------------------------------------------------------------------------------- numbers

# What stands for a sign, a separator or a space of a number, in plain characters.
_PLAIN = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_PLAIN |= dict.fromkeys(map(ord, "\u2007\u2009\u202f"), "\u00a0")
_PLAIN |= {0xFF0B: "+", 0xFF0E: ".", 0xFF0C: ",", 0xFF0F: "/", 0x066B: ".", 0x066C: ","}
_PLAIN |= {0x2019: "'"}
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b",
                        "0123456789+-")  # fmt: skip
_LATEX = ((r"\{,\}|\\!", ""), (r"\\([$%])", r"\1"), (r"(?<=\d)(?:\\[,:; ]|~)(?=\d)", "\u00a0"))

_GROUPED = (
    r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?"  # 1,234,567.8
    r"|[1-9]\d?(?:,\d{2})+,\d{3}(?!\d)(?:\.\d+)?"  # 12,34,567.8
    r"|(?P<spaced>[1-9]\d{0,2}(?:[\u00a0'_]\d{3})+(?!\d)(?:[.,]\d+)?)"  # 1 234 567.8
    r"|(?P<pointed>[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})(?![.,]?\d))"  # 1.234.567,8
)
_NUMBER = re.compile(
    r"(?:(?<![\d/.,])(?P<whole>\d+) )?(?<![\d/.,])(?P<over>\d+)/(?P<under>\d+)(?![\d/]|[.,]\d)"
    r"|\\[dt]?frac(?:\{(?P<top>-?\d+)\}\{(?P<bottom>-?\d+)\}|(?P<one>\d)(?P<two>\d))"
    rf"|(?P<value>{_GROUPED}|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE](?P<exponent>[+-]?\d+)(?!\w)"
    r"|\s*(?:[x*\u00d7\u00b7\u22c5]|\\times|\\cdot)\s*10\^\{?(?P<tens>[+-]?\d+)"
    r"|\^\{?(?P<power>[+-]?\d+))?",
    re.ASCII,
)
# A minus after a digit, a letter or a bracket is an operator, not a sign; so is one before a space,
# unless an equals sign comes first. A currency may stand between it and the number.
_SIGN = re.compile(
    r"((?<![A-Za-z0-9_)\]}%-])[+-]|(?<==)\s*-\s+)(?:[A-Z]{0,3}[$\u00a2-\u00a5\u20a0-\u20cf]\s?)?$"
)


def last_number(text: str) -> decimal.Decimal | None:
    r"""The last number of a text, or None.

    Thousands may be grouped by commas, narrow spaces or, where it cannot be meant otherwise, by
    points; exponents, powers and fractions are worked out; units, currencies and percent signs do
    not count.

    >>> last_number("5 - 7 = -2."), last_number("costs $1,250.50, no more"), last_number("20-15")
    (Decimal('-2'), Decimal('1250.50'), Decimal('15'))
    >>> last_number("about 5e-3"), last_number(r"x = -\frac{3}{4}"), last_number("none")
    (Decimal('0.005'), Decimal('-0.75'), None)
    """
    text = _plain_numbers(text)
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    with decimal.localcontext(prec=60, Emax=9999, Emin=-9999):
        try:
            number = _value(found)
        except (decimal.DecimalException, ValueError):
            return None  # divided by zero, or too large to be told from others
    sign = _SIGN.search(text, max(found.start() - 40, 0), found.start())
    return number.copy_negate() if sign and "-" in sign[1] else number


def _value(found: re.Match[str]) -> decimal.Decimal:
    """What a match of ``_NUMBER`` comes to, without its sign."""
    number, parts = decimal.Decimal, found.groupdict()
    for over, under in (("over", "under"), ("top", "bottom"), ("one", "two")):
        if parts[over]:
            fraction = number(parts[over]) / number(parts[under])
            return fraction + number(parts["whole"]) if parts["whole"] else fraction
    value = parts["value"]
    if parts["spaced"]:
        value = re.sub("[\u00a0'_]", "", value).replace(",", ".")
    elif parts["pointed"]:
        value = value.replace(".", "").replace(",", ".")
    value = number(value.replace(",", ""))
    if exponent := parts["exponent"] or parts["tens"]:
        return number(f"{value:f}E{exponent}")
    return value ** int(parts["power"]) if parts["power"] else value


def _plain_numbers(text: str) -> str:
    """A text with its numbers in plain digits and signs: full width, raised, LaTeX's and others."""
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    text = re.sub(r"(?<![*\d.])(\d[\d.]*)\*\*(?=[+-]?\d)", r"\1^", text.translate(_PLAIN))
    text = re.sub(
        "(?<=\\d)[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+", lambda m: "^" + m[0].translate(_RAISED),
        text,
    )  # fmt: skip
    return text if text.isascii() else re.sub(r"[^\x00-\x7f]", _plain_digit, text)


def _plain_digit(found: re.Match[str]) -> str:
    digit, before = unicodedata.decimal(found[0], None), found.string[: found.start()][-1:]
    if digit is not None:
        return str(digit)
    fraction = unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/")
    if unicodedata.category(found[0]) == "No" and "/" in fraction:
        return f" {fraction}" if before.isdigit() else fraction
    return found[0]


# ------------------------------------------------------------------------------------------ names

_QUOTES = "\"'`*$\u201c\u201d\u2018\u2019"
_EDGES = re.compile(rf"^[\s({{\[{_QUOTES}]+|[\s.,;:!?)}}\]{_QUOTES}]+$")
# After the article and the pronoun, which are no answers, come nouns and verbs; not these.
_ARTICLE = r"(?!\s+(?!(?:is|and|or|but|because|since|as|not|seems|fits)\b)[a-z])"


class _Names:
    """Which of some names a text names first, each as a whole word.

    A name's capitals are looked for as capitals, so that the article "a" is no A and "may" no May,
    and its other letters in either case, as sentences begin; what has but one letter, or capitals
    alone, is looked for in its own case. Where nothing is found, case does not count for the names
    of several letters that have small ones.
    """

    def __init__(self, names: Iterable[str]):
        found = sorted({_spaced(name) for name in names} - {""}, key=len, reverse=True)
        self._known = {name.casefold(): name for name in reversed(found)}
        # Names that differ in case alone are one, but for letters.
        self._own = {
            name: name if len(name) == 1 else self._known[name.casefold()] for name in found
        }
        self._patterns = [
            re.compile("|".join(f"({_pattern(name, exact)})" for name in found) or r"(?!)")
            for exact in (True, False)
        ]
        self._found = found

    def __call__(self, text: str) -> str | None:
        text = _spaced(text)
        for whole in (text, _EDGES.sub("", text)):
            if whole in self._own:
                return self._own[whole]
            if whole.casefold() in self._known:
                return self._own[self._known[whole.casefold()]]
        for pattern in self._patterns:
            if found := pattern.search(text):
                return self._own[self._found[(found.lastindex or 1) - 1]]
        return None


def _spaced(text: str) -> str:
    """A text on one line, with single spaces."""
    return " ".join(_plain(text).split())


def _pattern(name: str, exact: bool) -> str:
    """A regular expression for a name as a whole word; see `_Names`."""
    if len(name) == 1 or name.isupper():
        text = re.escape(name)
    elif exact:
        runs = re.findall(r"[A-Z]|[^A-Z]+", name)
        text = "".join(run if run.isupper() else f"(?i:{re.escape(run)})" for run in runs)
    else:
        text = f"(?i:{re.escape(name)})"
    before, after = r"(?<!\w)(?<!\w[-\u2010\u2011'\u2019])", r"(?!\w|[-\u2010\u2011'\u2019]\w|[+#])"
    if name[0].isdigit():
        before += r"(?<!\d[.,/:])(?<![-+\u2212.])"
    if name[-1].isdigit():
        after += r"(?![.,/:]\d)"
    pattern = before + text + after
    if name in ("A", "I", "a"):
        pattern += _ARTICLE
    if len(name) == 1 and name.isalpha():
        pattern += rf"|(?<=\()(?i:{name})(?=\))"
    return pattern
