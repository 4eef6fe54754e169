"""How answers are scored, and that a model is asked each question as if it were alone."""

import decimal
import functools
import json

import pytest
import tokenizers
import transformers

from hyperadapt_jax import models
from train.assembly import write_rows
from train.errors import InputError
from train.metrics.generation import GenerationEval
from train.metrics.scoring import last_number, score


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
        ("-" + "1" * 60, "-" + "1" * 60),
        ("about 5e-05", "0.00005"),
        ("1.5E3 or so", "1500"),
        ("x = \u22125", "-5"),
        ("5\u20137", "7"),
        ("\uff0d\uff11\uff12\uff0e\uff15", "-12.5"),
        ("\u0663\u0664", "34"),
        ("\u662f-5", "-5"),
        ("it is -$5, -US$1,200", "-1200"),
        ("= - 5", "-5"),
        ("- 5 apples", "5"),
        ("+5.", "5"),
        ("the answer--5", "5"),
        ("2024-01-05", "5"),
        ("1\u202f234\u202f567,5", "1234567.5"),
        ("1\u00a0234", "1234"),
        ("12,34,567", "1234567"),
        ("1.234,56", "1234.56"),
        ("1.234.567", "1234567"),
        ("1.234", "1.234"),
        ("1'234", "1234"),
        (r"1{,}234 or 12\,345", "12345"),
        (r"**\boxed{-18}**", "-18"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"\dfrac34", "0.75"),
        ("3/4", "0.75"),
        ("7 1/2 cups", "7.5"),
        ("1\u00bd", "1.5"),
        ("3/4/2024", "2024"),
        ("60/2=30", "30"),
        ("5/0", None),
        ("5 x 10^3", "5000"),
        (r"5 \times 10^{-3}", "0.005"),
        ("5\u00b710\u00b3", "5000"),
        ("2**10", "1024"),
        ("2^99999999", None),
        ("1e99999999999999999999", None),
        ("90^\\circ", "90"),
        ("5 m\u00b2", "5"),
        ("50\\% of it", "50"),
        ("COVID-19", "19"),
        ("inf", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else decimal.Decimal(number))


def test_marks():
    assert score("none", ["a"], ["a"]) is None
    assert score("exact", [" a\n", "a b", "A", ""], ["a", "a  b", "a", ""]) == [
        True,
        False,
        False,
        True,
    ]
    answers = ["12 + 3 = 15.0", "15", "", "fifteen"]
    assert score("last-number", answers, ["#### 15"] * 4) == [True, True, False, False]
    answers = ["Answer2, not answer1", "I say answer10", "untrue", "answer1 answer2", ""]
    references = ["answer2", "answer10", "true", "answer2", " answer1 "]
    assert score("first-match", answers, references) == [True, True, False, False, False]
    with pytest.raises(InputError, match="'no number here': give another score, or --reference"):
        score("last-number", ["1", "2"], ["3", "no number here"])
    with pytest.raises(InputError, match="--score first-match"):
        score("first-match", ["1", "2"], ["3", " "])


@pytest.mark.parametrize(
    ("names", "right", "wrong"),
    [
        ("B A C", ["B", "(b)", "b", "B.", "**B**", r"\boxed{B}", "A hard one. B", "a matter of B",
                   "It is B because A is not", "I'm sure: B", "A's mass, so B", "A-level: B"],
         ["", "a", "AB", "B's brother", "B12", "B-52", "vitamin b12", "to be", "C, B", "A is B"]),
        ("true false", ["True", "it is TRUE, not false"], ["Trueish", "untrue", "true-ish", "No"]),
        ("US OK", ["the US."], ["let us be", "us-based"]),
        ("June May", ["it may be June", "june"], ["May be", "maybe"]),
        ("1 2", ["1", "option 1", "1."], ["1.5", "-1", "1/2", "0.1", "1:2", "11"]),
        ("toxic", ["Toxic!"], ["non-toxic", "a non-toxic one"]),
        ("answer1 answer10", ["Answer1, not answer10"], ["answer10", "answer1b"]),
        ("C C++", ["C", "C, not C++"], ["C++", "C++."]),
        ("New\u00a0York", ["in New  York"], ["New Yorkers"]),
    ],
)  # fmt: skip
def test_the_first_name(names, right, wrong):
    """The first of the names is the one that is right; the others can be chosen too."""
    first, *others = names.split(" ")
    texts = right + wrong
    marks = score("first-match", texts, [first] * len(texts), others)
    assert dict(zip(texts, marks, strict=True)) == {
        **dict.fromkeys(right, True), **dict.fromkeys(wrong, False)
    }  # fmt: skip


def test_the_same_text_has_many_forms():
    answers = [" e\u0301\r\nb ", "\ufeffx", "x\u00b2", "a  b"]
    assert score("exact", answers, ["\u00e9\nb", "x", "x2", "a b"]) == [True, True, False, False]


def test_an_answer_may_be_a_special_token():
    """Only the token that ends it is left out; spaces stay as they were said."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate("</s> <yes> i 'm".split())})
    )
    inner.add_special_tokens(["</s>", "<yes>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=True
    )
    decode = functools.partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    questions = GenerationEval([], [], decode, (0,), 1, 1, 1)
    assert questions._text([1, 0]) == "<yes>"
    assert questions._text([2, 3]) == "i 'm"
    assert questions._text([0]) == questions._text([]) == ""


def test_few_questions_are_not_filled_up(monkeypatch):
    """Two of them compute two rows, whatever number could be answered at once."""
    asked = []

    def generate(*_, prompts, **__):
        asked.append(len(prompts))
        return [[1]] * len(prompts)

    monkeypatch.setattr(models, "generate", generate)
    questions = GenerationEval([[1], [2]], ["", ""], Letters().decode, (0,), 1, 9, 32)
    assert questions.generations(None) == ["a", "a"] and asked == [2]


class Letters:
    """A tokenizer of letters."""

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=True):
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
    expected = [Letters().decode(tokens).removesuffix("$") for tokens in alone]
    references = [*expected[:3], "x", "", "y"]
    questions = GenerationEval(
        prompts=prompts,
        references=references,
        decode=Letters().decode,
        longest=5,
        batch_size=3,
        correct=lambda answers: score("exact", answers, references),
        **settings,
    )
    answers = questions.generations(fn, params)
    assert answers == expected and any(expected)
    right = [answer == reference for answer, reference in zip(answers, references, strict=True)]
    assert questions.accuracy(answers) == {"accuracy": sum(right) / 6}
    rows = questions.records(answers)
    write_rows(tmp_path / "file.jsonl", rows)
    lines = (tmp_path / "file.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [row["answer"] for row in rows] == answers
    assert [row["correct"] for row in rows] == right
    assert rows[0]["prompt"] == "abc" and rows[3]["reference"] == "x"
    with pytest.raises(InputError, match="nowhere"):
        write_rows(tmp_path / "nowhere" / "file.jsonl", rows)
