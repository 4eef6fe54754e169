"""Synthetic arithmetic: right answers, nothing held out in training, texts that survive tokens."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.tasks.arithmetic import problems
from train.tasks.arithmetic.problems import Problem

SEEDS = st.integers(0, 2**31 - 1)
ANSWERED = ("equation", "equations", "story", "story_equation", "ride")
EQUATION = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


def statements(problem: Problem) -> list[tuple[int, str, int, int]]:
    """What a problem says about numbers, read from its text and not from what made it."""
    if problem.kind == "story":
        (first, second), result = map(int, re.findall(r"\d+", problem.prompt)), int(problem.answer)
        return [(first, "+" if result > first else "-", second, result)]
    found = EQUATION.findall(problem.text)
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]


def family(statement: tuple[int, str, int, int]) -> tuple[int, int]:
    a, _, b, c = statement
    low, high, _ = sorted((a, b, c))
    return low, high


@pytest.mark.parametrize("task", ANSWERED)
@given(seed=SEEDS, held=st.booleans())
def test_every_answer_is_right(task, seed, held):
    for problem in problems.draw(task, 20, seed=seed, held=held):
        said = statements(problem)
        assert said and problem.kind == task and problem.answer
        for a, sign, b, c in said:
            assert c == (a + b if sign == "+" else a - b)
            assert all(1 <= number <= problems.LARGEST for number in (a, b, c))
        for before, after in zip(said, said[1:], strict=False):
            assert before[3] == after[0]


@pytest.mark.parametrize("task", problems.TASKS)
@given(seed=SEEDS, held=st.booleans())
def test_only_families_of_one_side_of_the_split_are_used(task, seed, held):
    for problem in problems.draw(task, 20, seed=seed, held=held):
        for statement in statements(problem) if task in ANSWERED else ():
            assert problems.held_out(family(statement)) == held
        if task not in ANSWERED:
            assert not EQUATION.search(problem.text)


def test_what_is_read_stands_beside_what_is_asked():
    for problem in problems.draw("reading", 100, seed=0, held=False):
        told = re.findall(r"(\d+)(?: people are)? at the (\w+)", problem.prompt)
        asked = re.search(r"at the (\w+)\?$", problem.prompt)[1]
        assert len(told) == 3 and dict((stop, n) for n, stop in told)[asked] == problem.answer


def test_a_ride_asks_for_two_steps_of_the_numbers_it_tells():
    seen = set()
    for problem in problems.draw("ride", 200, seed=0, held=True):
        (a, s, b, c), (d, t, e, _) = statements(problem)
        told = re.findall(r"(\d+) (?:people|get (\w+))", problem.prompt)
        assert [int(number) for number, _ in told] == [a, b, e] and c == d
        assert [way for _, way in told[1:]] == [{"+": "on", "-": "off"}[sign] for sign in (s, t)]
        seen.add(s + t)
    assert seen == {"+-", "-+"}


def test_training_and_evaluation_share_no_family_and_every_family_is_on_a_side():
    sides = [{family(fact) for fact in problems.facts(held)} for held in (False, True)]
    everything = {(a, b) for b in range(1, 99) for a in range(1, b + 1) if a + b <= 99}
    assert sides[0].isdisjoint(sides[1]) and sides[0] | sides[1] == everything
    assert {fact.family for fact in problems.facts(True)} == sides[1]
    # The committed weights were trained on this very split: another one would leak.
    assert (len(sides[0]), len(sides[1])) == (2140, 310)


def test_the_mixture_has_its_shares_and_no_problem_of_the_demo():
    drawn = problems.draw(problems.MIXTURE, 4000, seed=3, held=False)
    kinds = [problem.kind for problem in drawn]
    assert "ride" not in problems.MIXTURE and sum(problems.MIXTURE.values()) == 100
    for kind, share in problems.MIXTURE.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share / 100, abs=0.025)
    # Words of the demo's task are known beforehand, so that only what they ask is new.
    known = set(re.findall("[a-z]+", " ".join(problem.text for problem in drawn)))
    asked = " ".join(p.prompt for p in problems.draw("ride", 500, seed=0, held=False))
    assert set(re.findall("[a-z]+", asked)) <= known


@given(seed=SEEDS, count=st.integers(0, 30))
def test_problems_are_a_function_of_the_seed(seed, count):
    more = problems.draw(problems.MIXTURE, 30, seed=seed, held=False)
    assert problems.draw(problems.MIXTURE, count, seed=seed, held=False) == more[:count]


def test_another_seed_or_side_gives_other_problems():
    one, two = (problems.draw("ride", 50, seed=seed, held=False) for seed in (0, 1))
    assert one != two
    assert set(one).isdisjoint(problems.draw("ride", 50, seed=0, held=True))


@given(seed=SEEDS, operators=st.text("+-?", min_size=1, max_size=4), held=st.booleans())
def test_a_chain_has_the_operators_that_were_asked_for(seed, operators, held):
    found = problems.chain(np.random.default_rng(seed), held, operators)
    assert len(found) == len(operators)
    for fact, operator in zip(found, operators, strict=True):
        assert operator in ("?", fact.operator)


def test_spelled_numbers_differ_and_are_read_back():
    spelled = [problems.spell(number) for number in range(100)]
    assert len(set(spelled)) == 100
    assert (spelled[0], spelled[13], spelled[60], spelled[99]) == (
        "zero", "thirteen", "sixty", "ninety nine",
    )  # fmt: skip
    for problem in problems.draw("numeral", 300, seed=0, held=False):
        digits = re.findall(r"\d+", problem.answer)
        if " backwards " in problem.answer:
            assert digits[0] == digits[1][::-1]
        else:
            words = re.sub(r" ?(in words is|in digits is|\d+|\.) ?", "", problem.answer)
            assert spelled.index(words) == int(digits[0])


@pytest.mark.parametrize("answer, right", [
    ("31+12=43, 43-8=35", True), (" 31+12=43, 43-8=35 ", True), ("31+12=43", False),
    ("31+12=43, 43-8=36", False), ("31+12=43, 43-8=35, 35+1=36", False), ("", False),
])  # fmt: skip
def test_an_answer_counts_only_if_all_of_it_is_right(answer, right):
    assert problems.correct(Problem("", "31+12=43, 43-8=35", "ride"), answer) is right


@pytest.mark.parametrize("answer, right", [
    ("43", True), ("43, 43-8=35", True), ("4", False), ("435", False), ("43-8=35", False),
])  # fmt: skip
def test_a_bare_equation_may_go_on_to_others(answer, right):
    assert problems.correct(Problem("31+12=", "43", "equation"), answer) is right


@given(seed=SEEDS)
def test_texts_survive_the_tokenizer(seed):
    tokenizer = problems.tokenizer()
    drawn = problems.draw({**problems.MIXTURE, "ride": 20}, 50, seed=seed, held=bool(seed % 2))
    for problem in drawn:
        ids = tokenizer.encode(problem.text).ids
        assert tokenizer.decode(ids) == problem.text
        assert ids[0] == 1 and 3 not in ids and len(ids) < 64
        # Prompt and answer have the same tokens apart as they have together.
        parts = [
            tokenizer.encode(part, add_special_tokens=False).ids
            for part in (problem.prompt, problem.answer)
        ]
        assert ids == [1, *parts[0], *parts[1]]


def test_text_as_people_type_it_has_the_same_tokens():
    tokenizer = problems.tokenizer()
    typed = tokenizer.encode("  A bus carries 31 people .\nHow many?  31 + 12 = 43 ,43-8=35")
    assert tokenizer.decode(typed.ids) == "a bus carries 31 people. how many? 31+12=43, 43-8=35"
    assert tokenizer.encode("a xylophone").tokens == ["<bos>", "a", "<unk>"]


def test_the_vocabulary_begins_with_the_special_tokens_and_repeats_none():
    words = problems.vocabulary()
    assert words[:4] == problems.SPECIAL == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert len(set(words)) == len(words) == problems.tokenizer().get_vocab_size()
    assert "".join(words[4:14]) == "0123456789"


@given(seed=SEEDS, answers_alone=st.booleans())
def test_examples_ask_for_the_next_token_of_what_is_to_be_learned(seed, answers_alone):
    tokenizer = problems.tokenizer()
    drawn = problems.draw(problems.MIXTURE, 20, seed=seed, held=False)
    rows = problems.examples(drawn, tokenizer, answers_alone=answers_alone)
    asked = problems.prompts(drawn, tokenizer)
    for problem, row, prompt in zip(drawn, rows, asked, strict=True):
        tokens, labels = row["tokens"], row["labels"]
        assert tokens.dtype == labels.dtype == np.int32 and tokens.shape == labels.shape
        assert tokenizer.decode(tokens) == problem.text and tokens[0] == 1
        assert tokens[: len(prompt)].tolist() == prompt
        learned = labels != -100
        assert (labels[:-1] == tokens[1:])[learned[:-1]].all() and labels[-1] == 2
        if answers_alone:
            assert tokenizer.decode(labels[learned]) == problem.answer
        else:
            assert learned.all()
