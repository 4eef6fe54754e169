"""Prompts and answers: labels are the answers' tokens, and prompts are what a model is asked."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

from train import chat, data
from train.batches import IGNORE
from train.chat import Form, Template
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
        return data.read(file, form.columns, cache_dir=tmp_path / "cache")

    return rows


def plain(prompt="{question}\n", **options):
    return Form(Template(prompt), **options)


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
    tokenizer, form = make(template), Form()
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


def test_prompt_and_answer_can_be_turns_of_a_chat(rows):
    tokenizer = byte_level(CHATML)
    turns = rows(Form(), [{"messages": CHAT[:2]}])
    expected = chat.examples(turns, Form(), tokenizer, 100).data[:]
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
        (Form(), {"messages": CHAT}, None, "no chat template: give --prompt"),
        (
            plain(chat=True),
            {"question": "a", "answer": "b"},
            None,
            "no chat template: give --prompt",
        ),
        (Form(), {"messages": CHAT[:1]}, CHATML, "no answer .* chat of user that begins with 'Is"),
        (
            Form(),
            {"messages": CHAT[:2]},
            CHATML + "{{ 'x' if add_generation_prompt }}",
            "otherwise",
        ),
        (Form(), {"messages": CHAT[1:]}, INST, "refuses the chat of assistant, user, .*: no"),
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
    values = data.read(file, form.columns, cache_dir=tmp_path).select(range(40))
    made = chat.examples(values, form, tokenizer, 4096)
    for row, asked, example in zip(
        values, chat.prompts(values, form, tokenizer), made.data, strict=True
    ):
        tokens, learned = told(example)
        assert tokens[:-1] == tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"]
        assert asked == tokenizer(f"{row['question']}\n")["input_ids"]
        assert tokens == asked + learned and learned[-1] == tokenizer.eos_token_id
