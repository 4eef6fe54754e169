"""Prompts and answers as tokens and labels: what a decoder reads, and what it is to say.

A row becomes pieces of text, some of which are answers. Each piece is tokenised on its own, so that
a prompt has in training the very tokens that it has when the model is asked, whatever the answer
begins with. A piece that goes on is tokenised as text after a line break, which is then taken away,
so that no tokenizer puts the space before it with which it begins a text.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import jinja2

from train import data
from train.batches import IGNORE
from train.data import Column, Examples, Messages, Text
from train.errors import InputError

_BREAK = "\n"


class Piece(NamedTuple):
    """A part of a row's text, and whether the model is to learn it."""

    text: str
    answer: bool


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

    def __post_init__(self):
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
class Form:
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
            return {"messages": Messages()}
        return dict.fromkeys([*self.prompt.columns, *self.answer.columns], Text())

    def pieces(self, row: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        """The pieces of a row; the last one is an answer.

        Raises:
          InputError: the chat template refuses the row, or it has no answer.
        """
        if self.prompt is None:
            return _turns(row["messages"], tokenizer)
        prompt, answer = self.prompt.fill(row), self.answer.fill(row)
        if self.chat:
            roles = zip(("user", "assistant"), (prompt, answer), strict=True)
            return _turns([{"role": role, "content": text} for role, text in roles], tokenizer)
        return [Piece(prompt, False), Piece(answer, True)]


def examples(rows: datasets.Dataset, form: Form, tokenizer: Any, max_length: int) -> Examples:
    """Make examples of rows, whose labels are the answers' tokens alone.

    The end-of-text token follows an answer, unless the chat template has put it there. An example
    that is too long is cut at its end; where that leaves no label, the row is dropped.

    Args:
      rows: with the form's columns.
      form: how they read.
      tokenizer: a fast one of transformers.
      max_length: most tokens of an example.

    Returns:
      Examples of ``tokens`` and ``labels``: ``labels[i]`` is what follows ``tokens[i]``, or -100.

    Raises:
      InputError: the tokenizer has no chat template and the form needs one, it has no end-of-text
        token, or a row has no answer.
    """
    check(form, tokenizer)
    if max_length < 2:
        raise InputError(f"max_length {max_length}: expected at least 2")

    def make(columns: Mapping[str, list]) -> dict[str, list]:
        made: dict[str, list] = {"tokens": [], "labels": [], "truncated": []}
        for tokens, learned in _encode(_pieces(columns, form, tokenizer), form, tokenizer):
            labels = [t if said else IGNORE for t, said in zip(tokens, learned, strict=True)]
            tokens, labels = tokens[:-1][:max_length], labels[1:][:max_length]
            if set(labels) - {IGNORE}:
                made["tokens"].append(tokens)
                made["labels"].append(labels)
                made["truncated"].append(len(learned) > max_length + 1)
        return made

    integers = datasets.List(datasets.Value("int32"))
    features = {"tokens": integers, "labels": integers}
    return data.tokenise(rows, make, features, (data.identity(tokenizer), form, max_length))


def prompts(rows: datasets.Dataset, form: Form, tokenizer: Any) -> list[list[int]]:
    """The tokens that come before each row's last answer, to have a model continue them.

    Args:
      rows: with the form's columns.
      form: how they read.
      tokenizer: a fast one of transformers.

    Raises:
      InputError: as for `examples`.
    """
    check(form, tokenizer)
    before = [pieces[:-1] for pieces in _pieces(rows[:], form, tokenizer)]
    return [tokens for tokens, _ in _encode(before, form, tokenizer, end=False)]


def check(form: Form, tokenizer: Any) -> None:
    """Refuses a tokenizer that lacks what the form needs."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token, so answers could never end")
    if (form.chat or form.prompt is None) and not tokenizer.chat_template:
        raise InputError(
            r"the tokenizer has no chat template: give --prompt, such as '{question}\n',"
            " and no --chat"
        )


def _pieces(columns: Mapping[str, list], form: Form, tokenizer: Any) -> list[list[Piece]]:
    rows = zip(*(columns[name] for name in form.columns), strict=True)
    return [form.pieces(dict(zip(form.columns, row, strict=True)), tokenizer) for row in rows]


def _turns(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """A chat's pieces: each of the assistant's turns is an answer, up to the last of them.

    A template may show an earlier turn in another way once more has been said, as those do that
    leave out what a model thought. Such a turn is not learned: the model never says it so.
    """

    def render(messages: Sequence[Mapping[str, str]], ask: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )

    said = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not said:
        raise InputError(f"there is no answer of the assistant to learn in the {_shown(messages)}")
    pieces, end, messages = [], 0, messages[: said[-1] + 1]
    try:
        whole = render(messages, False)
        for i in said:
            before, until = render(messages[:i], True), render(messages[: i + 1], False)
            if whole.startswith(until) and until.startswith(before) and len(before) >= end:
                pieces.append(Piece(whole[end : len(before)], False))
                pieces.append(Piece(whole[len(before) : len(until)], True))
                end = len(until)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise InputError(f"the chat template refuses the {_shown(messages)}: {error}") from error
    if end < len(whole):
        raise InputError(
            f"the chat template shows the last answer otherwise than it asks for it, in the"
            f" {_shown(messages)}: give --prompt and --answer without --chat"
        )
    return pieces


def _shown(messages: Sequence[Mapping[str, str]]) -> str:
    roles = ", ".join(turn["role"] for turn in messages[:5])
    return f"chat of {roles} that begins with {messages[0]['content'][:40]!r}"


def _encode(
    rows: Sequence[Sequence[Piece]], form: Form, tokenizer: Any, end: bool = True
) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each row, and which of them belong to answers."""

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    # A chat template writes the first token itself; else it is the tokenizer's own, if it has one.
    chat = form.chat or form.prompt is None
    first = [] if chat else [t for t in tokenizer("")["input_ids"] if t == tokenizer.bos_token_id]
    rows = [[piece for piece in pieces if piece.text or piece.answer] for pieces in rows]
    begins = iter(encode([pieces[0].text for pieces in rows if pieces]))
    texts = [piece.text for pieces in rows for piece in pieces[1:]]
    (broken,), after = encode([_BREAK]), encode([_BREAK + text for text in texts])
    # Where the break melts into what follows, the text's own tokens have to do.
    melted = [i for i, tokens in enumerate(after) if tokens[: len(broken)] != broken]
    after = [tokens[len(broken) :] for tokens in after]
    for i, tokens in zip(melted, encode([texts[i] for i in melted]), strict=True):
        after[i] = tokens
    rest = iter(after)

    stop, encoded = tokenizer.eos_token_id, []
    for pieces in rows:
        tokens, learned = list(first[:1]), [False] * len(first[:1])
        for i, piece in enumerate(pieces):
            new = next(rest) if i else next(begins)
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
