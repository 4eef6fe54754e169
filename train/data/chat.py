"""Prompts and answers as tokens and labels: what a decoder reads, and what it is to say.

A row becomes segments of text, some of which are answers. Each is tokenized on its own, so that
a prompt has in training the very tokens that it has when the model is asked, whatever the answer
begins with. A segment that continues a text is tokenized as text after a line break, which is then
taken away, so that no tokenizer puts the space before it with which it begins a text.

What stands in a row is text, even where it spells a token that ends an answer or begins a turn:
there it is taken apart. The same token in a prompt, or in a chat template, is that token.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import jinja2

from ..errors import InputError
from .batches import IGNORE
from .columns import Column, Messages, Text, Tools
from .examples import Examples, build_examples, identity
from .readers import PLACE
from .special import SpecialTokens

_BREAK = "\n"
_NO_CHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # which no text should have
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What the two kinds of losses are called where they are told.
EMPTY = "empty answers"
UNLEARNED = "turns of the assistant that the chat template shows otherwise later, not learned"


class Segment(NamedTuple):
    """A part of a row's text, and whether the model is to learn it.

    Attributes:
      parts: of the text; no token goes from one into the next.
      answer: whether it is to be learned.
    """

    parts: tuple[str, ...]
    answer: bool


class Read(NamedTuple):
    """A row as it reads.

    Attributes:
      pieces: of its text; the last one is an answer.
      empty: answers that say nothing.
      unlearned: turns of the assistant that should be answers, and are none.
    """

    pieces: list[Segment]
    empty: int = 0
    unlearned: int = 0


@dataclasses.dataclass(frozen=True)
class Template:
    r"""Text with places for columns, ``{name}``; ``{{`` and ``}}`` are braces.

    What is written as ``\n`` or ``\t`` is a line break or a tab, for the command line's sake.
    Nothing of a value is looked up and nothing is computed.

    Raises:
      InputError: a brace is left open, or holds anything but a column's name.

    >>> Template(r"{question}\nAnswer in {{braces}}: ").fill({"question": "1+1?"})
    '1+1?\nAnswer in {braces}: '
    """

    text: str

    def __post_init__(self) -> None:
        for _, name in self.pieces:
            if name is not None and (not name.strip() or set(name) & set(".[]")):
                raise InputError(f"template {self.text!r}: {{{name}}} is no plain column name")

    @functools.cached_property
    def pieces(self) -> list[tuple[str, str | None]]:
        """Texts, and the column that follows each of them, if one does."""
        text = self.text.replace(r"\n", "\n").replace(r"\t", "\t")
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {self.text!r}: {error}; write a brace as {{{{") from None
        for _, name, spec, conversion in parsed:
            if spec or conversion:
                raise InputError(f"template {self.text!r}: {{{name}}} can have no format")
        return [(before, name) for before, name, *_ in parsed]

    @property
    def columns(self) -> list[str]:
        """The columns that it has places for."""
        return list(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, row: Mapping[str, str]) -> str:
        """The text of a row."""
        return "".join(before + (row[name] if name else "") for before, name in self.pieces)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a row reads: a prompt and an answer, plain or as turns of a chat, or a whole chat.

    Attributes:
      prompt: what the model is given; None where rows have a chat in the column ``messages``.
      answer: what it is to say.
      chat: wrap prompt and answer as the turns of user and assistant, as the tokenizer's chat
        template says.
    """

    prompt: Template | None = None
    answer: Template = Template("{answer}")
    chat: bool = False

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that rows must have."""
        if self.prompt is None:
            return {"messages": Messages(), "tools": Tools()}
        return dict.fromkeys([*self.prompt.columns, *self.answer.columns], Text())

    def read(self, row: Mapping[str, Any], tokens: SpecialTokens) -> Read:
        """The pieces of a row.

        Raises:
          InputError: the chat template refuses the row or does not show all of it, or it has no
            answer.
        """
        quoted = _Quoted(row, tokens)
        if self.prompt is None:
            return _turns(row["messages"], row["tools"], quoted)
        row = {name: quoted(row[name]) for name in self.columns}
        prompt, answer = self.prompt.fill(row), self.answer.fill(row)
        if self.chat:
            roles = zip(("user", "assistant"), (prompt, answer), strict=True)
            return _turns([{"role": role, "content": text} for role, text in roles], None, quoted)
        pieces = [quoted.piece(prompt, False), quoted.piece(answer, True)]
        return Read(pieces, empty=not answer.strip())


def examples(
    rows: datasets.Dataset, form: PromptFormat, tokenizer: Any, max_length: int
) -> Examples:
    """Makes examples of rows, whose labels are the answers' tokens alone.

    The end-of-text token follows an answer, unless the chat template has put it there. An example
    that is too long is truncated at its end; where that leaves no label, the row is dropped.

    Args:
      rows: with the form's columns.
      form: how they read.
      tokenizer: a fast one of transformers.
      max_length: most tokens of an example.

    Returns:
      Examples of ``tokens`` and ``labels``: ``labels[i]`` is what follows ``tokens[i]``, or -100.
      Their counts are of `EMPTY` and `UNLEARNED`.

    Raises:
      InputError: the tokenizer has no chat template and the form needs one, it has no end-of-text
        token, or a row has no answer.
    """
    check(form, tokenizer)
    if max_length < 2:
        raise InputError(f"max_length {max_length}: expected at least 2")

    def make(columns: Mapping[str, list]) -> dict[str, list]:
        names = ["tokens", "labels", "truncated", EMPTY, UNLEARNED]
        names += [PLACE] if PLACE in columns else []
        made: dict[str, list] = {name: [] for name in names}
        read = _read(columns, form, tokenizer)
        encoded = _encode([row.pieces for row in read], form, tokenizer)
        for i, (row, (tokens, learned)) in enumerate(zip(read, encoded, strict=True)):
            labels = [t if said else IGNORE for t, said in zip(tokens, learned, strict=True)]
            tokens, labels = tokens[:-1][:max_length], labels[1:][:max_length]
            if set(labels) - {IGNORE}:
                values = [tokens, labels, len(learned) > max_length + 1, row.empty, row.unlearned]
                values += [columns[PLACE][i]] if PLACE in columns else []
                for name, value in zip(made, values, strict=True):
                    made[name].append(value)
        return made

    integers = datasets.List(datasets.Value("int32"))
    features = {"tokens": integers, "labels": integers}
    key = (identity(tokenizer), form, max_length)
    return build_examples(rows, make, features, key, (EMPTY, UNLEARNED))


def prompts(rows: datasets.Dataset, form: PromptFormat, tokenizer: Any) -> list[list[int]]:
    """The tokens that come before each row's last answer, to have a model continue them.

    Args:
      rows: with the form's columns.
      form: how they read.
      tokenizer: a fast one of transformers.

    Raises:
      InputError: as for `examples`.
    """
    check(form, tokenizer)
    before = [row.pieces[:-1] for row in _read(rows[:], form, tokenizer)]
    return [tokens for tokens, _ in _encode(before, form, tokenizer, end=False)]


def references(rows: datasets.Dataset, tokenizer: Any) -> list[str]:
    """What each row's last answer should be, of rows with chats.

    It is the text of the turn; where there is more to it, such as a call of a tool, it is what the
    chat template shows, up to the token that ends it.
    """
    found, tokens = [], SpecialTokens(tokenizer)
    for row, read in zip(rows, _read(rows[:], PromptFormat(), tokenizer), strict=True):
        messages = json.loads(row["messages"])
        turn = messages[_learned(messages)[-1]]
        text = "".join(read.pieces[-1].parts)
        plain = turn.keys() <= {"role", "content", "weight"}
        found.append(turn["content"] if plain else tokens.split(text)[0])
    return found


def check(form: PromptFormat, tokenizer: Any) -> None:
    """Refuses a tokenizer that lacks what the form needs."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token, so answers could never end")
    if (form.chat or form.prompt is None) and not tokenizer.chat_template:
        raise InputError(
            r"the tokenizer has no chat template: give --prompt, such as '{question}\n',"
            " and no --chat"
        )


def _read(columns: Mapping[str, list], form: PromptFormat, tokenizer: Any) -> list[Read]:
    """Rows as they read; what is wrong with one is said with its place."""
    names = [*form.columns, *([PLACE] if PLACE in columns else [])]
    found, tokens = [], SpecialTokens(tokenizer)
    for values in zip(*(columns[name] for name in names), strict=True):
        row = dict(zip(names, values, strict=True))
        place = row.pop(PLACE, None)
        if form.prompt is None:
            row = {name: value and json.loads(value) for name, value in row.items()}
        try:
            found.append(form.read(row, tokens))
        except InputError as error:
            raise InputError(f"{place}: {error}" if place else str(error)) from error
    return found


# ----------------------------------------------------------------------------------- text of rows


class _Quoted:
    """Makes the texts of a row such that no template turns them into special tokens.

    Where one is spelled, a character that the row does not have parts it; `piece` parts the text
    there, once the template is filled.
    """

    def __init__(self, row: Mapping[str, Any], tokens: SpecialTokens):
        self.tokens = tokens
        self._row = row

    @functools.cached_property
    def mark(self) -> str:
        """A character that is nowhere in the row."""
        text = json.dumps(self._row, ensure_ascii=False)
        mark = next((mark for mark in _NO_CHARACTERS if mark not in text), None)
        if mark is None:
            raise InputError("the row has every character that Unicode sets aside for no text")
        return mark

    def __call__(self, value: Any) -> Any:
        """A value of the row, each text in it quoted."""
        if isinstance(value, str):
            parts = self.tokens.apart(value)
            return value if len(parts) == 1 else self.mark.join(parts)
        if isinstance(value, Mapping):
            return {self(name): self(inner) for name, inner in value.items()}
        return [self(inner) for inner in value] if isinstance(value, list) else value

    def piece(self, text: str, answer: bool) -> Segment:
        """A piece of a text with quoted ones in it."""
        return Segment(tuple(filter(None, text.split(self.mark))), answer)


# ------------------------------------------------------------------------------------------- chats


def _learned(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the turns that are to be learned: the assistant's, but for weight 0."""
    for number, turn in enumerate(messages, 1):
        if turn.get("weight") and turn["role"] != "assistant":
            raise InputError(
                f"message {number}, of {turn['role']!r}, has a weight: the assistant's turns alone"
                " are learned"
            )
    return [
        i for i, turn in enumerate(messages)
        if turn["role"] == "assistant" and turn.get("weight", 1)
    ]  # fmt: skip


def _turns(messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, quoted: _Quoted) -> Read:
    """A chat's pieces: each of the assistant's turns is an answer, up to the last of them.

    A template may show an earlier turn in another way once more has been said, as those do that
    leave out what a model thought. Such a turn is not learned: the model never says it so.
    """
    said = _learned(messages)
    if not said:
        raise InputError(f"there is no answer of the assistant to learn in the {_shown(messages)}")
    try:
        chat = _Chat(
            [{k: quoted(v) for k, v in turn.items() if k != "weight"}
             for turn in messages[: said[-1] + 1]],
            quoted(tools),
            quoted.tokens,
        )  # fmt: skip
        chat.check()
        spans = chat.marked(said) or [chat.span(i) for i in said]
    except _REFUSALS as error:
        if isinstance(error, InputError):
            raise InputError(f"{error}, in the {_shown(messages)}") from error
        raise InputError(f"the chat template refuses the {_shown(messages)}: {error}") from error
    if spans[-1] is None:
        raise InputError(
            f"the chat template shows the last answer otherwise than it asks for it, in the"
            f" {_shown(messages)}: give --prompt and --answer without --chat"
        )
    pieces, done = [], 0
    for start, end in filter(None, spans):
        if start >= done:
            pieces.append(quoted.piece(chat.whole[done:start], False))
            pieces.append(quoted.piece(chat.whole[start:end], True))
            done = end
    empty = [i for i in said if messages[i].keys() <= {"role", "content", "weight"}
             and not messages[i]["content"].strip()]  # fmt: skip
    return Read(pieces, len(empty), len(said) - len(pieces) // 2)


# What a template raises on a chat that it was not made for.
_REFUSALS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip

Span = tuple[int, int]  # of a text, from the first character to the one after the last


class _Chat:
    """A chat that ends with a turn of the assistant, and what a tokenizer's template makes of it.

    Attributes:
      whole: the text of all of it, in which the last turn is asked for as it is of a model.
    """

    def __init__(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, tokens: SpecialTokens
    ):
        self._messages, self._tools = messages, tools
        self._tokens, self._tokenizer = tokens, tokens.tokenizer
        self.whole = self._text(messages)

    def _render(self, messages: Sequence[Any], ask: bool = False, **options: Any) -> str:
        options = {"tools": self._tools, "tokenize": False, **options}
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=ask, **options
        )

    def check(self) -> None:
        """Refuses what the template shows nothing of, since nobody would miss it.

        Raises:
          InputError: there is such a message, a field of one, or the tools.
        """
        if self._tools and not self._differs(self._messages, tools=None):
            raise InputError("the chat template shows nothing of the row's 'tools'")
        for i, turn in enumerate(self._messages):
            text, what = turn["content"].strip(), f"message {i + 1}, of {turn['role']!r}"
            other = {**turn, "content": text + _NO_CHARACTERS[-1]}
            if text not in self.whole and not self._shows(i, other):
                raise InputError(f"the chat template shows nothing of {what}")
            # Whose answer a tool's is, its place says too.
            links = {"tool_call_id", "name"} if turn["role"] == "tool" else set()
            for name in turn.keys() - {"role", "content", *links}:
                rest = {k: v for k, v in turn.items() if k != name}
                if turn[name] not in ("", [], {}) and not self._shows(i, rest):
                    raise InputError(f"the chat template shows nothing of {name!r} in {what}")

    def _shows(self, i: int, turn: Mapping[str, Any]) -> bool:
        """Whether it makes a difference if this turn stands for the i-th one."""
        before, after = self._messages[:i], self._messages[i + 1 :]
        return self._differs([*before, turn, *after]) or self._differs([*before, turn])

    def _differs(self, messages: Sequence[Any], **options: Any) -> bool:
        """Whether the template shows other messages, or options, in another way than these."""
        for end, ask in ((len(messages), False), (len(messages) - 1, True)):
            try:
                ours = self._render(self._messages[:end], ask)
            except _REFUSALS:
                continue
            try:
                if self._render(messages[:end], ask, **options) != ours:
                    return True
            except _REFUSALS:
                return True
        return False

    def marked(self, said: Sequence[int]) -> list[Span | None] | None:
        """The turns as the template itself marks what is generated; None where it does not."""
        template = self._tokenizer.get_chat_template(tools=self._tools)
        if not _GENERATION.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[self._messages],
            tools=self._tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        (spans,) = rendered[1]
        theirs = [i for i, turn in enumerate(self._messages) if turn["role"] == "assistant"]
        if len(spans) != len(theirs):
            raise InputError(
                f"the chat template marks {len(spans)} generations for {len(theirs)} turns"
            )
        return [(span[0], span[1]) for i, span in zip(theirs, spans, strict=True) if i in said]

    def span(self, i: int) -> Span | None:
        """Where the whole chat shows the i-th turn as the model is to say it; None if nowhere."""
        asked = self._render(self._messages[:i], ask=True)
        until = self._text(self._messages[: i + 1])
        if not until.startswith(asked):
            return None
        start = self._start(i, asked, self.whole, self._messages, self._text)
        if start is None:
            return None
        said, there = (self._tokens.split(t) for t in (until[len(asked) :], self.whole[start:]))
        same = 0
        while same < min(len(said), len(there)) and said[same] == there[same]:
            same += 1
        shared = said[:same]
        if same % 2 == 0 and same < min(len(said), len(there)):
            shared += [said[same]] * there[same].startswith(said[same])
        # What any text ends with need not be there: special tokens, and spaces between.
        if any(text.strip() for text in said[len(shared) + len(shared) % 2 :: 2]):
            return None
        return start, start + len("".join(shared))

    def _text(self, messages: Sequence[Any]) -> str:
        """All of the messages, the last of which is shown after what a model is asked with."""
        whole, asked = self._render(messages), self._render(messages[:-1], True)
        start = self._start(len(messages) - 1, asked, whole, messages, self._render)
        return whole if start is None else asked + whole[start:]

    def _start(
        self, i: int, asked: str, whole: str, messages: Sequence[Any], show: Callable[[Any], str]
    ) -> int | None:
        """Where the whole text, which is what ``show`` makes of it, has asked for the i-th turn."""
        if whole.startswith(asked):
            return len(asked)
        if not i:
            return None
        # What comes first differs, such as where the system's text stands: the turn follows the
        # message before it, whose end is found by what stays when that message says another thing.
        silent = list(messages)
        silent[i - 1] = {**silent[i - 1], "content": _NO_CHARACTERS[-1]}
        tail = _same_end(asked, self._render(silent[:i], True))
        place = len(whole) - len(_same_end(whole, show(silent)))
        return place + len(tail) if whole.startswith(tail, place) else None


def _same_end(one: str, other: str) -> str:
    """The longest end that two texts share."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return one[len(one) - count :]


def _shown(messages: Sequence[Mapping[str, str]]) -> str:
    roles = ", ".join(turn["role"] for turn in messages[:5])
    return f"chat of {roles} that begins with {messages[0]['content'][:40]!r}"


def _encode(
    rows: Sequence[Sequence[Segment]], form: PromptFormat, tokenizer: Any, end: bool = True
) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each row, and which of them belong to answers."""

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    # A chat template writes the first token itself; else it is the tokenizer's own, if it has one.
    chat = form.chat or form.prompt is None
    first = [] if chat else [t for t in tokenizer("")["input_ids"] if t == tokenizer.bos_token_id]
    rows = [[piece for piece in pieces if piece.parts or piece.answer] for pieces in rows]
    texts = [[part for piece in pieces for part in piece.parts] for pieces in rows]
    begins = iter(encode([parts[0] for parts in texts if parts]))
    others = [part for parts in texts for part in parts[1:]]
    (broken,), after = encode([_BREAK]), encode([_BREAK + text for text in others])
    # Where the break melts into what follows, the text's own tokens have to do.
    melted = [i for i, tokens in enumerate(after) if tokens[: len(broken)] != broken]
    after = [tokens[len(broken) :] for tokens in after]
    for i, tokens in zip(melted, encode([others[i] for i in melted]), strict=True):
        after[i] = tokens
    rest = iter(after)

    stop, encoded = tokenizer.eos_token_id, []
    for pieces in rows:
        tokens, learned = list(first[:1]), [False] * len(first[:1])
        parts = begins
        for i, piece in enumerate(pieces):
            new = []
            for _ in piece.parts:
                new += next(parts)
                parts = rest
            last = end and i == len(pieces) - 1
            if last and stop not in new:
                new = [*new, stop]
            # What a chat template writes after the end of an answer, the model never says.
            said = new.index(stop) + 1 if stop in new else len(new)
            new = new[:said] if last else new
            tokens += new
            learned += [piece.answer and place < said for place in range(len(new))]
        encoded.append((tokens, learned))
    return encoded
