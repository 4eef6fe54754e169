"""How answers are marked, and that a model is asked each question as if it were alone."""

import decimal
import json

import pytest

from hyperadapt_jax import models
from train.answers import Questions, last_number, mark
from train.errors import InputError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("It costs $1,234,567.80.", "1234567.8"),
        ("from 3,4 and 5", "5"),
        ("3,4", "4"),
        ("so 20-15", "15"),
        ("so 20 - 15", "15"),
        ("20-15=-5 .", "-5"),
        ("(a)-3", "3"),
        ("it falls by -0.50%", "-0.5"),
        (".5", "0.5"),
        ("7 apples and no more", "7"),
        ("none", None),
        ("-", None),
        ("1" * 60, "1" * 60),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else decimal.Decimal(number))


def test_marks():
    assert mark("none", ["a"], ["a"]) is None
    assert mark("exact", [" a\n", "a b", "A", ""], ["a", "a  b", "a", ""]) == [
        True,
        False,
        False,
        True,
    ]
    answers = ["12 + 3 = 15.0", "15", "", "fifteen"]
    assert mark("last-number", answers, ["#### 15"] * 4) == [True, True, False, False]
    answers = ["Answer2, not answer1", "I say answer10", "untrue", "answer1 answer2", ""]
    references = ["answer2", "answer10", "true", "answer2", " answer1 "]
    assert mark("first-match", answers, references) == [True, True, False, False, False]
    with pytest.raises(InputError, match="'no number here': give another score, or --reference"):
        mark("last-number", ["1", "2"], ["3", "no number here"])
    with pytest.raises(InputError, match="--score first-match"):
        mark("first-match", ["1", "2"], ["3", " "])


class Letters:
    """A tokenizer of letters."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join("$abcdefgh"[token] for token in tokens if token or not skip_special_tokens)


def test_questions_are_answered_as_if_each_were_alone(tmp_path):
    config = models.config_from_dict(
        dict(
            model_type="llama",
            vocab_size=9,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    fn, params = models.functional(models.create(config, seed=3))
    prompts = [[1, 2, 3], [4], [], [5, 6], [7] * 9, [8, 1, 2, 3]]
    settings = dict(max_new_tokens=4, stop_tokens=(0,))
    alone = [
        models.generate(fn, params, prompts=[prompt], **settings)[0] if 0 < len(prompt) <= 5 else []
        for prompt in prompts
    ]
    expected = [Letters().decode(tokens, skip_special_tokens=True) for tokens in alone]
    references = [*expected[:3], "x", "", "y"]
    questions = Questions(
        prompts=prompts,
        references=references,
        score="exact",
        tokenizer=Letters(),
        longest=5,
        rows=3,
        **settings,
    )
    answers = questions.answers(fn, params)
    assert answers == expected and any(expected)
    right = [answer == reference for answer, reference in zip(answers, references, strict=True)]
    assert questions.accuracy(answers) == {"accuracy": sum(right) / 6}
    questions.save(tmp_path / "file.jsonl", answers)
    rows = [json.loads(line) for line in (tmp_path / "file.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == answers
    assert [row["right"] for row in rows] == right
    assert rows[0]["prompt"] == "abc" and rows[3]["reference"] == "x"
    with pytest.raises(InputError, match="nowhere"):
        questions.save(tmp_path / "nowhere" / "file.jsonl", answers)
