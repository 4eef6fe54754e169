"""GLUE's files with their quirks, its examples and its metrics."""

import warnings

import datasets
import numpy as np
import pytest
import tokenizers
import transformers

from train.data import glue
from train.data.examples import identity
from train.data.glue import TASKS
from train.data.text import EMPTY, tokenize
from train.errors import InputError
from train.tasks.glue import best, metrics

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]


@pytest.fixture(scope="module")
def tokenizer():
    """Words of one letter, between BERT's special tokens."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    # As some folders have it: neither may count.
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def read(tmp_path):
    """`glue.read`, with a cache of its own."""

    def read(task, source, split="train"):
        return glue.read(TASKS[task], source, split, cache_dir=tmp_path / "cache")

    return read


@pytest.fixture
def write(tmp_path):
    """Writes a file of rows of columns, and gives GLUE's folder."""

    def write(name, rows, start=""):
        file = tmp_path / "glue" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(map(str, row)) for row in rows]
        file.write_text(start + "\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "glue"

    return write


MNLI = ["index", "sentence1", "sentence2", "label1", "gold_label"]
FILES = {
    "cola": ("CoLA/train.tsv", [["gj04", 1, "", 'say "a'], ["gj04", 0, "*", "b"]]),
    "sst2": ("SST-2/train.tsv", [["sentence", "label"], ['say "a', 1], ["b", 0]]),
    "mrpc": (
        "MRPC/train.tsv",
        [
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [1, 7, 8, 'say "a', "c"],
            [0, 7, 8, "half"],
            [0, 7, 8, "b", ""],
        ],
    ),
    "stsb": (
        "STS-B/train.tsv",
        [
            ["index", "sentence1", "sentence2", "score"],
            [0, 'say "a', "c", "5.000"],
            [1, "b", "", 0.25],
        ],
    ),
    "rte": (
        "RTE/train.tsv",
        [
            ["index", "sentence1", "sentence2", "label"],
            [0, 'say "a', "c", "not_entailment"],
            [1, "b", "", "entailment"],
        ],
    ),
    "wnli": (
        "WNLI/train.tsv",
        [["index", "sentence1", "sentence2", "label"], [0, 'say "a', "c", 1], [1, "b", "", 0]],
    ),
    "qnli": (
        "QNLI/train.tsv",
        [
            ["index", "question", "sentence", "label"],
            [0, 'say "a', "c", "not_entailment"],
            [1, "b", "", "entailment"],
        ],
    ),
    "qqp": (
        "QQP/train.tsv",
        [
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            [0, 1, 2, 'say "a', "c", 1],
            [0, 1, 2, "half", "c"],
            [0, 1, 2, "b", "", 0],
        ],
    ),
    "mnli": (
        "MNLI/train.tsv",
        [
            MNLI,
            [0, 'say "a', "c", "x", "neutral"],
            [1, "none", "c", "x", "-"],
            [2, "b", "", "x", "entailment"],
        ],
    ),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("inner", [True, False], ids=["glue's folder", "the task's"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte-order mark"])
def test_files_are_read_with_their_quirks(write, read, task, inner, mark):
    folder = write(*FILES[task], start=mark)
    rows, dropped = read(task, folder if inner else folder / TASKS[task].folder)
    assert rows["text"][:] == ['say "a', "b"]
    assert "pair" not in rows.column_names or rows["pair"][:] == ["c", ""]
    assert rows["label"][:] == ([5.0, 0.25] if task == "stsb" else [1, 0])
    assert dropped == (task in ("mrpc", "qqp", "mnli"))


@pytest.mark.parametrize("task", TASKS)
def test_the_hubs_data_set_gives_the_same_columns(read, monkeypatch, tmp_path, task):
    texts = TASKS[task].texts or TASKS[task].columns[:-1]
    rows = {**{name: ["x", "y"] for name in texts}, "label": [1, 0], "idx": [0, 1]}
    file = tmp_path / "hub.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(file)
    load, asked = datasets.load_dataset, []

    def from_file(name, config, split):
        asked.append((name, config, split))
        return load("parquet", data_files=str(file), split="train", cache_dir=tmp_path / "hub")

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    for split in ("train", *TASKS[task].dev):
        found, dropped = read(task, glue.HUB, split)
        assert found["label"][:] == [1, 0] and found["text"][:] == ["x", "y"] and not dropped
    validation = [split.replace("dev", "validation") for split in TASKS[task].dev]
    assert asked == [("nyu-mll/glue", task, split) for split in ("train", *validation)]


def test_mnli_has_two_sets_to_evaluate_on(write, read):
    for split in TASKS["mnli"].dev:
        folder = write(f"MNLI/{split}.tsv", [MNLI, [0, split, "c", "x", "neutral"]])
    for split in ("dev_matched", "dev_mismatched"):
        assert read("mnli", folder, split)[0]["text"][:] == [split]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "sst2",
            [["sentence", "label"], ["a", 1], ["b", 2]],
            "train.tsv:3: column 'label' is '2': e",
        ),
        ("sst2", [["sentence", "label"], ["a", 1], ["b", ""]], "train.tsv:3: column 'label' is ''"),
        (
            "sst2",
            [["sentence", "label"], ["a", 1], ["b", "good"]],
            "train.tsv:3: .*0 .negative., 1 ",
        ),
        ("sst2", [["sentence", "label"], ["a", 1], ["b", 1]], "all 2 training rows .* 'positive'"),
        ("sst2", [["sentence", "label"], ["a", 1], ["b"]], "train.tsv:3 has 1 columns"),
        ("sst2", [["sentence", "label"]], "train.tsv has no rows"),
        ("sst2", [["text", "label"], ["a", 1]], "there is no column 'sentence'; nearest: text"),
        ("mnli", [MNLI, [0, "a", "b", "x", "-"]], "none of the 1 rows of train has a label"),
        (
            "stsb",
            [["sentence1", "sentence2", "score"], ["a", "b", "5.1"]],
            "train.tsv:2: column 'score' is '5.1': expected a number from 0 to 5",
        ),
    ],
)
def test_bad_files_are_refused_with_the_line(write, read, task, rows, message):
    folder = write(f"{TASKS[task].folder}/train.tsv", rows)
    with pytest.raises(InputError, match=message):
        read(task, folder)


def test_a_folder_without_the_task_is_refused(write, read):
    folder = write(*FILES["sst2"])
    with pytest.raises(InputError, match="glue holds neither CoLA/train.tsv nor train.tsv"):
        read("cola", folder)


def test_one_class_may_be_evaluated(write, read):
    folder = write("SST-2/dev.tsv", [["sentence", "label"], ["a", 1], ["b", 1]])
    assert read("sst2", folder, "dev")[0]["label"][:] == [1, 1]


def test_examples_are_cut_from_the_longer_text_and_counted(write, read, tokenizer):
    folder = write("RTE/train.tsv", [["sentence1", "sentence2", "label"], *RTE])
    rows, _ = read("rte", folder)
    examples = tokenize(rows, tokenizer, 8)
    found = [
        ("".join(WORDS[i][0] for i in row["tokens"]), row["token_types"].tolist(), row["label"])
        for row in examples.data
    ]
    assert found == [
        ("[ab[c[", [0, 0, 0, 0, 1, 1], 0),
        ("[ab[efg[", [0, 0, 0, 0, 1, 1, 1, 1], 1),
        ("[abc[ab[", [0, 0, 0, 0, 0, 1, 1, 1], 1),
    ]
    assert (examples.truncated, examples.dropped) == (2, 0)
    assert tokenize(rows, tokenizer, 20).truncated == 0
    with pytest.raises(InputError, match="max_length 4: expected at least 5"):
        tokenize(rows, tokenizer, 4)


RTE = [
    ["a b", "c", "entailment"],
    ["a b", "e f g h", "not_entailment"],
    ["a b c d e f", "a b", "not_entailment"],
]


@pytest.mark.parametrize("most", [20, 9])
def test_what_spells_a_special_token_is_text(write, read, tokenizer, most):
    rows = [["a [SEP] b", "[CLS]c[PAD]", "entailment"], ["a", " ", "not_entailment"]]
    folder = write("RTE/train.tsv", [["sentence1", "sentence2", "label"], *rows])
    made = tokenize(read("rte", folder)[0], tokenizer, most)
    tokens = made.data[0]["tokens"].tolist()
    special = [tokenizer.convert_tokens_to_ids(f"[{name}]") for name in ("CLS", "SEP", "PAD")]
    assert [token for token in tokens if token in special] == [1, 2, 2]
    assert (len(tokens) == most, made.truncated) == ((True, 1) if most == 9 else (False, 0))
    assert made.data[0]["token_types"].sum() == len(tokens) - tokens.index(2) - 1
    assert made.counts == {EMPTY: 1}
    assert list(made.places) == [f"{folder / 'RTE' / 'train.tsv'}:{n}" for n in (2, 3)]


def test_examples_have_no_types_where_the_tokenizer_has_none(write, read, tokenizer):
    rows, _ = read("cola", write(*FILES["cola"]))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert tokenize(rows, plain, 8).data.column_names == ["tokens", "label"]


def test_a_tokenizers_identity_is_what_its_numbers_depend_on(tokenizer):
    first = identity(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=2)
    assert identity(tokenizer) == first
    inner = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.normalizer = tokenizers.normalizers.Lowercase()
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    assert identity(other) != first


LABELS = np.array([1] * 8 + [0] * 4)
PREDICTIONS = np.array(
    [1] * 6 + [0] * 2 + [1] + [0] * 3
)  # 6 true positives, 2 false negatives, ...


def test_metrics_of_classes_are_their_definitions():
    found = {"dev": (PREDICTIONS, LABELS)}
    assert metrics(TASKS["rte"], found) == {"accuracy": pytest.approx(9 / 12)}
    expected = {"accuracy": pytest.approx(9 / 12), "f1": pytest.approx(12 / 15)}
    assert metrics(TASKS["mrpc"], found) == metrics(TASKS["qqp"], found) == expected
    matthews = (6 * 3 - 1 * 2) / np.sqrt(7 * 8 * 4 * 5)
    assert metrics(TASKS["cola"], found) == {"matthews": pytest.approx(matthews)}
    both = {"dev_matched": (LABELS, LABELS), "dev_mismatched": (PREDICTIONS, LABELS)}
    expected = {"accuracy_matched": 1.0, "accuracy_mismatched": pytest.approx(9 / 12)}
    assert metrics(TASKS["mnli"], both) == expected


def test_metrics_of_numbers_are_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 21, 50) / 4
    predictions = labels**3 + rng.normal(0, 9, 50).round()
    found = metrics(TASKS["stsb"], {"dev": (predictions.astype(np.float32), labels)})

    def ranks(values):  # ties share the mean of their ranks
        return [(np.sum(values < v) + np.sum(values <= v)) / 2 for v in values]

    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    expected = np.corrcoef(ranks(predictions), ranks(labels))[0, 1]
    assert found["spearman"] == pytest.approx(expected)
    exact = metrics(TASKS["stsb"], {"dev": (2 * labels - 1, labels)})
    assert exact == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}


@pytest.mark.parametrize("task", TASKS)
def test_predictions_that_say_nothing_have_a_defined_score(task):
    odd = [np.zeros(12), np.ones(12)]
    if task == "stsb":
        odd += [np.full(12, np.nan), np.full(12, np.inf), 3 + 1e-8 * LABELS]
        odd = [values.astype(np.float32) for values in odd]
    else:
        odd = [values.astype(np.int32) for values in odd]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in odd:
            for labels in (LABELS, np.zeros(12, int), LABELS[:1]):
                found = metrics(
                    TASKS[task], dict.fromkeys(TASKS[task].dev, (values[: len(labels)], labels))
                )
                assert all(0 <= value <= 1 for value in found.values())
                assert best(TASKS[task]) == next(iter(found))
                if task in ("stsb", "cola"):
                    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("task", "split", "rows", "positive"),
    [
        ("cola", "train", 8551, 6023),
        ("cola", "dev", 1043, 721),
        ("sst2", "dev", 872, 444),
        ("mrpc", "train", 3667, 2473),
        ("mrpc", "dev", 408, 279),
    ],
)
def test_the_real_files_hold_what_is_known_of_them(shared, read, task, split, rows, positive):
    found, dropped = read(task, shared / "data" / "glue", split)
    assert (len(found), dropped) == (rows, 0)
    assert sum(found["label"][:]) == positive


def test_the_real_scores_of_sentence_pairs(shared, read):
    rows, _ = read("stsb", shared / "data" / "glue" / "STS-B", "dev")
    assert len(rows) == 1500 and min(rows["label"][:]) == 0.0 and max(rows["label"][:]) == 5.0
    assert rows[0]["text"] == "A man with a hard hat is dancing."
