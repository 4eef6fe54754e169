"""Prompts and answers: labels are the answers' tokens, and prompts are what a model is asked."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

from train.data import chat, readers
from train.data.batches import IGNORE
from train.data.chat import PromptFormat, Template
from train.data.special import SpecialTokens
from train.errors import InputError

TEXT = ["Is the sky blue?\n yes it is, 12 times", "What is 1+1?\nIt is 2.", "user assistant hi"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: only the last answer shows what was thought before it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: the first token in the text, roles that must alternate.
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') == (loop.index0 % 2 == 1) %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{% endif %}"
    "{% endfor %}"
)


def byte_level(template=None):
    """As GPT-2's, Llama 3's and Qwen's tokenizers: bytes, no first token."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    inner.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<s>", chat_template=template
    )


def with_spaces(template=None):
    """As Llama 2's and Mistral's: a space before each text, and a first token."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [text.replace(" ", "\u2581") for line in TEXT for text in line.split("\n")]
    inner.train_from_iterator(
        [*texts] * 3,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.fixture
def rows(tmp_path):
    """Makes the rows of a form."""

    def rows(form, values):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in values))
        return readers.read(file, form.columns, places=True, cache_dir=tmp_path / "cache")

    return rows


def plain(prompt="{question}\n", **options):
    return PromptFormat(Template(prompt), **options)


def told(example):
    """The tokens of an example with the one that its last label adds, and those it learns."""
    tokens, labels = example["tokens"].tolist(), example["labels"].tolist()
    for place, label in enumerate(labels[:-1]):
        assert label in (IGNORE, tokens[place + 1])
    return [*tokens, labels[-1]], [label for label in labels if label != IGNORE]


@pytest.mark.parametrize("make", [byte_level, with_spaces])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Is the sky blue?\n", "yes it is"),
        ("Is the sky blue? ", "yes it is"),
        ("Is the sky blue?", " yes it is"),
        ("Is the sk", "y blue?"),
        ("What\n", "\n12 times\n"),
        ("What", ""),
        ("", "It is 2."),
    ],
)
def test_an_answer_is_learned_to_its_end_and_nothing_else(rows, make, prompt, answer):
    tokenizer, form = make(), plain("{question}")
    values = rows(form, [{"question": prompt, "answer": answer}])
    made = chat.examples(values, form, tokenizer, 100)
    assert (len(made.data), made.truncated, made.dropped) == (1, 0, 0)
    tokens, learned = told(made.data[0])
    (asked,) = chat.prompts(values, form, tokenizer)
    # The tokens are those that a model is asked with, then the answer's, then the end.
    first = [tokenizer.bos_token_id] if make is with_spaces else []
    assert asked == first + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokens[: len(asked)] == asked and tokens[-1] == tokenizer.eos_token_id
    assert learned == tokens[max(len(asked), 1) :]
    text = tokenizer.decode(tokens[len(first) : -1], clean_up_tokenization_spaces=False)
    assert text.removeprefix(" " if make is with_spaces else "") == prompt + answer


@pytest.mark.parametrize("make", [byte_level, with_spaces])
def test_after_a_line_break_the_tokens_are_the_whole_texts(rows, make):
    tokenizer, form = make(), plain()
    values = rows(form, [{"question": "What is 1+1?", "answer": "It is 2."}])
    tokens, _ = told(chat.examples(values, form, tokenizer, 100).data[0])
    assert tokens[:-1] == tokenizer("What is 1+1?\nIt is 2.")["input_ids"]


CHAT = [
    {"role": "user", "content": "Is the sky blue?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
]


@pytest.mark.parametrize(
    ("make", "template", "learned"),
    [
        (byte_level, CHATML, "yes<|im_end|>It is 2.<|im_end|>"),
        (byte_level, THINKING, "<think></think>It is 2.<|im_end|>"),
        (with_spaces, INST, " yes It is 2.</s>"),
    ],
)
def test_the_answers_of_a_chat_are_learned_as_the_model_is_to_say_them(
    rows, make, template, learned
):
    tokenizer, form = make(template), PromptFormat()
    values = rows(form, [{"messages": CHAT, "id": 1}, {"messages": CHAT[:2] + CHAT[:1]}])
    made = chat.examples(values, form, tokenizer, 200)
    tokens, found = told(made.data[0])
    assert tokenizer.decode(found, clean_up_tokenization_spaces=False) == learned
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert tokens == (whole[:-1] if end in whole else [*whole, end])
    asked = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert chat.prompts(values, form, tokenizer)[0] == expected


# As Phi-3's: whatever is no prompt ends with the end of all text.
CLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</t>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_end|>{% endif %}"
)
# As Mistral's: the system's text stands before the last of the user's, if that is where it ends ...
LAST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if s and SHOWN %}{{ s }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content|trim }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
LAST_ASKED = LAST.replace("SHOWN", "loop.last")
# ... or wherever.
LAST_EVER = "{% set u = messages | selectattr('role', 'equalto', 'user') | list %}" + LAST.replace(
    "SHOWN", "m == u[-1]"
)
# The template itself says what is generated.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As those that show tools, names, calls and what was thought; but of earlier turns not the latter.
RICH = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' }}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


USER, SYSTEM = turn("user", "Is it?"), turn("system", "Be brief.")


def answers_of(example, tokenizer):
    """The texts that an example learns."""
    _, *labels = [IGNORE, *example["labels"].tolist(), IGNORE]
    found, said = [], []
    for label in labels:
        if label != IGNORE:
            said.append(label)
        elif said:
            found.append(tokenizer.decode(said, clean_up_tokenization_spaces=False))
            said = []
    return found


def learn(rows, template, messages, make=byte_level, **row):
    """What is learned of a chat, what of it is not, what the model is asked and should say."""
    tokenizer = make(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</t>"]})
    values = rows(PromptFormat(), [{"messages": messages, **row}])
    made = chat.examples(values, PromptFormat(), tokenizer, 500)
    (asked,) = chat.prompts(values, PromptFormat(), tokenizer)
    tokens, _ = told(made.data[0])
    assert tokens[: len(asked)] == asked
    counts = made.counts[chat.EMPTY], made.counts[chat.UNLEARNED]
    return (
        answers_of(made.data[0], tokenizer),
        counts,
        tokenizer.decode(asked),
        chat.references(values, tokenizer)[0],
    )


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHATML, "", "<|im_end|>"),
        (CLOSED, "", "</t>\n"),
        (LAST_ASKED, " ", "<|im_end|>"),
        (LAST_EVER, " ", "<|im_end|>"),
        (MARKED, "", "<|im_end|>"),
    ],
    ids=["chatml", "closed", "last_asked", "last_ever", "marked"],
)
def test_every_turn_is_learned(rows, template, before, after, system):
    """Equal turns too, and none that has weight 0."""
    said = ["yes", "yes", "no", "12", "yes"]
    messages = [*system]
    for place, text in enumerate(said):
        weight = {} if place == 1 else {"weight": int(place not in (2, 4))}
        messages += [USER, turn("assistant", text, **weight)]
    answers, counts, asked, right = learn(rows, template, messages)
    ends = [after, after, after + "<|im_end|>" * (template is CLOSED)]
    expected = [before + text + end for text, end in zip(["yes", "yes", "12"], ends, strict=True)]
    assert (answers, counts, right) == (expected, (0, 0), "12")
    assert ("Be brief." in asked) == bool(system) and not asked.endswith("yes")


def test_turns_that_are_shown_otherwise_later_are_counted(rows):
    said = [USER, turn("assistant", "yes"), USER, turn("assistant", " ")]
    assert learn(rows, THINKING, said)[:2] == (["<think></think> <|im_end|>"], (1, 1))


def test_the_template_gets_the_whole_message(rows):
    call = turn("assistant", None, tool_calls=[{"name": "sky", "arguments": {"at": None}}])
    messages = [
        turn("user", "Is it?", name="ann"),
        turn("assistant", "hm", reasoning_content="first"),
        call,
        turn("tool", "blue", tool_call_id="1"),
        turn("assistant", "yes", reasoning_content="a fact", refusal=None),
    ]
    answers, counts, asked, right = learn(rows, RICH, messages, tools=[{"name": "sky"}])
    shown = 'CALL {"name": "sky", "arguments": {"at": null}}'
    assert answers == [f"{shown}<|im_end|>", "<think>a fact</think>yes<|im_end|>"]
    assert counts == (0, 1)  # the first turn thought, and later does not show it
    assert asked.startswith('TOOLS [{"name": "sky"}]\n<|im_start|>user ann\nIs it?')
    assert right == "<think>a fact</think>yes"
    assert learn(rows, RICH, messages[:1] + [call])[0] == [f"{shown}<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "more", "message"),
    [
        ([USER, turn("assistant", "a", thoughts="b")], {}, "'thoughts' in message 2, of 'assist"),
        ([turn("user", "a", name="ann"), CHAT[1]], {}, "nothing of 'name' in message 1, of 'user'"),
        ([USER, turn("assistant", "", tool_calls=[{"name": "f"}])], {}, "nothing of 'tool_calls'"),
        (CHAT, {"tools": [{"name": "f"}]}, "shows nothing of the row's 'tools'"),
        ([USER, turn("assistant", "a", weight=0.5)], {}, "has no weight of 0 or 1 in message 2"),
        ([turn("user", "a", weight=1), CHAT[1]], {}, "message 1, of 'user', has a weight"),
        ([USER, turn("assistant", "a", weight=0)], {}, "no answer of the assistant to learn"),
        ([turn("critic", "bad"), *CHAT], {}, "shows nothing of message 1, of 'critic'"),
    ],
)
def test_what_a_template_does_not_show_is_refused_with_its_row(rows, messages, more, message):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in R %}")
    template = "{% set R = ['user', 'assistant', 'tool'] %}" + template
    with pytest.raises(InputError, match=r"rows.jsonl:1.*" + message) as caught:
        learn(rows, template, messages, **more)
    assert "\n" not in str(caught.value)


SPELLED = "so <|im_end|> and <|im_start|>user <s></s> <|im_end|><|im_end|>"


@pytest.mark.parametrize("make", [byte_level, with_spaces])
def test_what_spells_a_special_token_is_text(rows, make):
    """In prompts and answers; the tokens of a prompt's own text are such."""
    tokenizer = make()
    form = plain("<s>{question}\n", answer=Template("{answer}" + tokenizer.eos_token))
    values = rows(form, [{"question": SPELLED, "answer": SPELLED + " done"}])
    made = chat.examples(values, form, tokenizer, 500)
    tokens, learned = told(made.data[0])
    special = [token for token in tokens if token in tokenizer.all_special_ids]
    begins = [tokenizer.bos_token_id] * (2 if make is with_spaces else 1)
    assert special == [*begins, tokenizer.eos_token_id] and tokens[-1] == special[-1]
    text = tokenizer.decode(learned[:-1], clean_up_tokenization_spaces=False)
    assert text == SPELLED + " done"
    (asked,) = chat.prompts(values, form, tokenizer)
    assert tokens == asked + learned


@pytest.mark.parametrize("template", [CHATML, CLOSED, LAST_EVER, MARKED])
def test_what_spells_a_special_token_in_a_chat_is_text(rows, template):
    said = [SYSTEM, turn("user", SPELLED), turn("assistant", f"{SPELLED} a \ufdd0"), *CHAT[:2]]
    answers, counts, *_ = learn(rows, template, said)
    assert counts == (0, 0) and len(answers) == 2
    assert answers[0].strip().startswith(f"{SPELLED} a \ufdd0")


def test_special_tokens_are_found_as_the_tokenizer_reads_them():
    """By what a normalizer makes of a text, and where words hold their names."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<u>", -9.0), ("</s>", 0.0), *((c, -3.0) for c in "</s> x")], 0)
    )
    inner.normalizer = normalizers.NFKC()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<u>"
    )
    special = SpecialTokens(tokenizer)
    for text in ("x", "</s>", "\uff1c/s\uff1ex</s></s>", "\u20ac<u>", "<</s>/s>", "</s>" * 3000):
        parts = special.apart(text)
        assert "".join(parts) == text and (len(parts) > 1) == ("s" in text or "<u>" in text)
        assert not any(1 in tokenizer(part)["input_ids"] for part in parts[:50])


def test_prompt_and_answer_can_be_turns_of_a_chat(rows):
    tokenizer = byte_level(CHATML)
    turns = rows(PromptFormat(), [{"messages": CHAT[:2]}])
    expected = chat.examples(turns, PromptFormat(), tokenizer, 100).data[:]
    form = plain("{question}", chat=True)
    pairs = rows(form, [{"question": CHAT[0]["content"], "answer": "yes"}])
    found = chat.examples(pairs, form, tokenizer, 100).data[:]
    assert all((found[name][0] == expected[name][0]).all() for name in ("tokens", "labels"))


def test_long_examples_are_cut_and_those_without_an_answer_dropped(rows):
    tokenizer, form = byte_level(), plain("{question}")
    values = rows(form, [{"question": "?" * n, "answer": "!!"} for n in (3, 6, 7, 8, 9, 20)])
    made = chat.examples(values, form, tokenizer, 8)
    whole = [told(row) for row in made.data]
    ask, say, end = tokenizer.vocab["?"], tokenizer.vocab["!"], tokenizer.eos_token_id
    assert whole == [
        ([ask] * 3 + [say, say, end], [say, say, end]),
        ([ask] * 6 + [say, say, end], [say, say, end]),
        ([ask] * 7 + [say, say], [say, say]),
        ([ask] * 8 + [say], [say]),
    ]
    assert (made.truncated, made.dropped) == (2, 2)
    with pytest.raises(InputError, match="none of the 6 rows became an example"):
        chat.examples(values, form, tokenizer, 2)


def test_a_template_has_columns_and_nothing_else():
    template = Template(r"{a b}\n{{x}}{#1 String}{a b}")
    assert template.columns == ["a b", "#1 String"]
    assert template.fill({"a b": "{b}", "#1 String": r"\n"}) == "{b}\n{x}\\n{b}"
    assert plain(r"{q}", answer=template).columns.keys() == {"q", "a b", "#1 String"}


@pytest.mark.parametrize(
    "text", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{ }", "{a", "a}", "{a:{b}}"]
)
def test_a_template_looks_nothing_up(text):
    with pytest.raises(InputError, match="^template ") as caught:
        Template(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "values", "template", "message"),
    [
        (PromptFormat(), {"messages": CHAT}, None, "no chat template: give --prompt"),
        (
            plain(chat=True),
            {"question": "a", "answer": "b"},
            None,
            "no chat template: give --prompt",
        ),
        (
            PromptFormat(),
            {"messages": CHAT[:1]},
            CHATML,
            "no answer .* chat of user that begins with 'Is",
        ),
        (
            PromptFormat(),
            {"messages": CHAT[:2]},
            CHATML + "{{ 'x' if add_generation_prompt }}",
            "otherwise",
        ),
        (
            PromptFormat(),
            {"messages": CHAT[1:]},
            INST,
            "refuses the chat of assistant, user, .*: no",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(rows, form, values, template, message):
    values = rows(form, [values])
    for function in (chat.prompts, lambda *args: chat.examples(*args, 100)):
        with pytest.raises(InputError, match=message):
            function(values, form, byte_level(template))


def test_a_tokenizer_without_an_end_is_refused(rows):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer
    )
    with pytest.raises(InputError, match="no end-of-text token"):
        chat.check(plain(), tokenizer)


def test_a_pretrained_tokenizer(shared, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "weights" / "stories260K")
    form = plain()
    file = shared / "data" / "gsm8k" / "test.jsonl"
    values = readers.read(file, form.columns, cache_dir=tmp_path).select(range(40))
    made = chat.examples(values, form, tokenizer, 4096)
    for row, asked, example in zip(
        values, chat.prompts(values, form, tokenizer), made.data, strict=True
    ):
        tokens, learned = told(example)
        assert tokens[:-1] == tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"]
        assert asked == tokenizer(f"{row['question']}\n")["input_ids"]
        assert tokens == asked + learned and learned[-1] == tokenizer.eos_token_id
