"""Reading rows: what is right comes as it was written, what is wrong is named with its place."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data import readers
from train.data.columns import Label, Messages, Number, Text, Tools
from train.data.examples import build_examples, digest
from train.data.readers import PLACE
from train.errors import InputError

ROWS = [
    {"question": 'say "a, b"\tand c', "answer": "é\u2028x", "id": 1},
    {"question": "NA", "answer": "007", "id": 2},
    {"question": "", "answer": "null", "id": 3},
]
COLUMNS = {"answer": Text(), "question": Text()}


def json_array(file, rows):
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def json_lines(file, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows]
    file.write_text("\ufeff" + "".join(lines), encoding="utf-8")


def parquet(file, rows):
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)


def csv(file, rows):
    quoted = [[str(v).replace('"', '""') for v in row.values()] for row in rows]
    lines = [",".join(f'"{v}"' for v in row) for row in [list(rows[0]), *quoted]]
    file.write_text("\n".join(lines), encoding="utf-8")


WRITERS = {
    "rows.json": json_array,
    "lines.json": json_lines,
    "lines.jsonl": json_lines,
    "rows.parquet": parquet,
    "rows.csv": csv,
}


@pytest.fixture
def read(tmp_path):
    """`readers.read`, with a cache of its own."""

    def read(source, columns=COLUMNS, **options):
        return readers.read(source, columns, cache_dir=tmp_path / "cache", **options)

    return read


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path."""

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_as_they_were_written(tmp_path, read, name):
    WRITERS[name](tmp_path / name, ROWS)
    rows = read(tmp_path / name)
    assert rows.column_names == ["answer", "question"]
    assert rows[:] == {k: [row[k] for row in ROWS] for k in ("answer", "question")}


def test_a_tsv_has_plain_quotes_and_lines_that_end_with_a_line_feed(write, read):
    file = write("a.tsv", '\ufeffquestion\tanswer\n"a\t b"\r\n\nx\x85\u2028y\t\n')
    assert read(file)[:] == {"answer": [' b"', ""], "question": ['"a', "x\x85\u2028y"]}


def test_numbers_and_truth_become_text_as_json_writes_them(write, read):
    file = write("a.jsonl", '{"answer": 12, "question": 0.50}\n{"answer": true, "question": "q"}')
    assert read(file)[:] == {"answer": ["12", "true"], "question": ["0.5", "q"]}


def test_a_changed_file_is_read_again(write, read):
    file = write("a.csv", "question,answer\na,b\n")
    assert len(read(file)) == len(read(file)) == 1
    assert len(read(write("a.csv", "question,answer\na,b\nc,d\n"))) == 2
    assert read(file, {"answer": Text()}).column_names == ["answer"]


def test_a_folder_has_files_named_after_the_splits(write, read):
    for split in ("train", "dev"):
        for part in (0, 1):
            write(f"set/data/{split}-{part}.jsonl", json.dumps({"answer": f"{split}{part}"}))
    write("set/README.md", "")
    write("set/data/training_notes.json", "no JSON")
    folder = write("set/LICENSE", "").parent
    answers = {"answer": Text()}
    assert read(folder, answers)["answer"][:] == ["train0", "train1"]
    assert read(folder, answers, split="validation")["answer"][:] == ["dev0", "dev1"]
    with pytest.raises(InputError, match="no files of one kind for the split 'test'.*dev-0.jsonl"):
        read(folder, answers, split="test")
    write("set/train.csv", "answer\n1")
    with pytest.raises(InputError, match="one kind"):
        read(folder, answers)


def test_a_data_set_of_the_hub_is_checked_as_files_are(write, read, monkeypatch):
    file, load, asked = (
        write("a.jsonl", '{"answer": "1"}\n{"answer": null}'),
        datasets.load_dataset,
        [],
    )

    def from_cache(*args, split):
        asked.append((*args, split))
        return load("json", data_files=str(file), split="train", cache_dir=file.parent / "hub")

    monkeypatch.setattr(datasets, "load_dataset", from_cache)
    with pytest.raises(InputError, match=r"^some/name \(dev\): row 2: column 'answer' is null"):
        read("some/name", {"answer": Text()}, split="dev", config="main")
    assert asked == [("some/name", "main", "dev")]
    file.write_text('{"answer": "1"}\n{"answer": "2"}\n')
    assert read("some/name", {"answer": Text()})["answer"][:] == ["1", "2"]


def test_conversations_keep_all_fields_but_null(write, read):
    numbers = {"x": None, "y": [0.1 + 0.2, 2**70, 5e-324]}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": numbers}]}
    turns = [{"role": "user", "content": "hi", "name": "x"}, {**call, "content": None, "z": None}]
    tools = [{"name": "f", "parameters": {}}]
    rows = [{"messages": turns, "tools": tools}, {"messages": turns[:1], "tools": None}]
    rows += [{"messages": turns[:1], "tools": json.dumps(tools)}, {"messages": turns[:1]}]
    file = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read(file, {"messages": Messages(), "tools": Tools()})
    assert json.loads(found[0]["messages"]) == [turns[0], {**call, "content": ""}]
    assert [x and json.loads(x) for x in found["tools"]] == [tools, None, tools, None]
    for wrong in ("no JSON", 3, {}, ["f"]):
        with pytest.raises(InputError, match="a.jsonl:1: column 'tools' is "):
            read(write("a.jsonl", json.dumps({"messages": turns, "tools": wrong})),
                 {"messages": Messages(), "tools": Tools()})  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "a.json has no rows"),
        ("a.json", " \n[]", "a.json has no rows"),
        ("a.csv", "question,answer\n\n", "a.csv has no rows"),
        (
            "a.jsonl",
            '{"answer": "1", "question": ""}\n\n{"answer": \n',
            "a.jsonl:3: not JSON, at col",
        ),
        ("a.json", '[{"answer": "1",\n "question": }]', "a.json:2: not JSON, at column 14"),
        (
            "a.json",
            '[{"answer": "1", "question": ""}, 3]',
            "a.json: row 2 is a number: expected an ob",
        ),
        ("a.jsonl", '{"answer": NaN, "question": ""}', "a.jsonl:1: column 'answer' .* NaN"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"answer": "\xff"}', "a.jsonl:1 is not UTF-8 text, at char"),
        ("a.jsonl", '{"answer": "1"}', "a.jsonl:1: there is no column 'question'; nearest: answer"),
        ("a.jsonl", "{}", "a.jsonl:1: there is no column 'answer'; it has none"),
        (
            "a.jsonl",
            '{"answer": ["1"], "question": ""}',
            "a.jsonl:1: column 'answer' is a list: exp",
        ),
        ("a.csv", "question,answer\na,b\nc\n", "a.csv:3 has 1 columns, and the header 2"),
        ("a.csv", 'question,answer\na,b\nc,"d\n', "a.csv:3: not CSV"),
        (
            "a.csv",
            "question,answers\na,b\n",
            "a.csv:2: there is no column 'answer'; nearest: answers",
        ),
        ("a.tsv", "question\tanswer\na\tb\tc\n", "a.tsv:2 has 3 columns, and the header 2"),
        ("a.parquet", "PAR1", "a.parquet is no parquet file"),
        ("a.txt", "x", r"a.txt: expected a file of the kind \.json"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(write, read, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(write(name, text))
    assert "\n" not in str(caught.value)


BAD = {
    "null": (None, "is null"),
    "nan": (float("nan"), "is or holds NaN"),
    "infinity": (float("inf"), "is or holds Infinity"),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "hub"])
@pytest.mark.parametrize("kind", BAD)
def test_one_rule_for_values_that_are_none_in_every_reader(tmp_path, read, monkeypatch, name, kind):
    """They are refused with the file and the row, in columns that are wanted, and in no other."""
    value, message = BAD[kind]
    rows = [{"answer": 1.0, "other": value}, {"answer": value, "other": 1.0}]
    file = tmp_path / ("a.parquet" if name == "hub" else name)
    {".json": json_array, ".jsonl": json_lines, ".parquet": parquet}[file.suffix](file, rows)
    where = {"a.json": "a.json: row 2", "a.jsonl": "a.jsonl:3", "a.parquet": "a.parquet: row 2"}
    if name == "hub":
        found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "hub"))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    source = "some/name" if name == "hub" else file
    for column in (Text(), Number()):
        said = message if isinstance(column, Text) else "is (None|nan|inf): expected a number"
        with pytest.raises(InputError, match="column 'answer' " + said) as caught:
            read(source, {"answer": column})
        assert where.get(name, "some/name (train): row 2") in str(caught.value)
    rows[1]["answer"] = 2.0
    if name != "hub":
        {".json": json_array, ".jsonl": json_lines, ".parquet": parquet}[file.suffix](file, rows)
        assert read(file, {"answer": Text()})["answer"][:] == ["1.0", "2.0"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"answer": "1"}\n\nnull\n', "a.jsonl:3 is null: expected an object"),
        ("a.json", '[{"answer": "1"}, null]', "a.json: row 2 is null: expected an object"),
        ("a.jsonl", '{"answer": "1", "answer": "2"}', "a.jsonl:1: column 'answer' comes twice"),
        ("a.csv", "answer,x,answer\n1,2,3\n", "a.csv:2: column 'answer' comes twice"),
        ("a.tsv", "answer\tanswer\n1\t2\n", "a.tsv:2: column 'answer' comes twice"),
        ("a.jsonl", '{"answer": "a\\ud800b"}', "a.jsonl:1: column 'answer' .* half a character"),
        ("a.jsonl", b'{"answer": "1"}\n{"answer": "\xe9"}\n', "a.jsonl:2 is not UTF-8 text"),
        ("a.csv", b"answer\n1\n\xe9\n", "a.csv:3 is not UTF-8 text, at character 1"),
        ("a.tsv", b"answer\n1\n\xe9\n", "a.tsv:3 is not UTF-8 text, at character 1"),
        ("a.jsonl", '{"answer": 1e999}', "a.jsonl:1: column 'answer' is or holds Infinity"),
        ("a.jsonl", '{"answer": %s}' % ("9" * 5000), "a.jsonl:1: not JSON: Exceeds the limit"),
        ("a.csv", 'answer\n"1\n2"\nc,d\n', "a.csv:4 has 2 columns, and the header 1"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named(write, read, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(write(name, text), {"answer": Text()})
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_wanted_are_not_looked_at(write, read):
    file = write("a.jsonl", '{"answer": "1", "x": NaN, "x": "\\ud800"}\n')
    assert read(file, {"answer": Text()})["answer"][:] == ["1"]
    file = write("a.csv", "\n,answer,\n\n1,2,3\n")
    assert read(file, {"answer": Text()})["answer"][:] == ["2"]


def test_two_columns_of_one_name_in_parquet(tmp_path, read):
    names, file = ["answer", "x", "answer"], tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 3, names=names), file)
    assert read(file, {"x": Text()})["x"][:] == ["1"]
    with pytest.raises(InputError, match="a.parquet: row 1: column 'answer' comes twice"):
        read(file, {"answer": Text()})


def test_numbers_as_text_have_no_exponent(write, read):
    file = write("a.jsonl", "".join(f'{{"answer": {x}}}\n' for x in (5e-05, 1e16, 18.0, -0.0)))
    assert read(file, {"answer": Text()})["answer"][:] == [
        "0.00005", "10000000000000000", "18.0", "-0.0",
    ]  # fmt: skip


def test_a_file_that_changed_at_equal_size_and_time_is_read_again(write, read):
    file = write("a.csv", "answer\na\n")
    before = file.stat()
    assert read(file, {"answer": Text()})["answer"][:] == ["a"]
    write("a.csv", "answer\nb\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert read(file, {"answer": Text()})["answer"][:] == ["b"]


def test_a_row_says_where_it_stands(write, read):
    file = write("a.jsonl", '{"answer": "1"}\n\n{"answer": "2"}\n')
    rows = read(file, {"answer": Text()}, places=True)
    assert rows[PLACE][:] == [f"{file}:1", f"{file}:3"]
    file = write("b.csv", 'answer\n"1\n2"\n3\n')
    assert read(file, {"answer": Text()}, places=True)[PLACE][:] == [f"{file}:2", f"{file}:4"]


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        ("train train_socratic train.old", "train", "train"),
        ("train_socratic test_socratic", "train", "train_socratic"),
        ("train-0 train-1 train-10", "train", "train-0 train-1 train-10"),
        ("train-00000-of-00002-0123456789abcdef train-00001-of-00002-0123456789abcdef", "train",
         "train-00000-of-00002-0123456789abcdef train-00001-of-00002-0123456789abcdef"),
        ("validation-00000-of-00001 train-0", "dev", "validation-00000-of-00001"),
        ("dev validation", "dev", "dev"),
        ("dev validation", "val", None),
        ("train_a train_b", "train", None),
        ("train-0 train-old", "train", None),
        ("train-00000-of-00003 train-00002-of-00003", "train", None),
        ("train-0-of-2 train-1-of-2 train-0-of-1", "train", None),
        ("train_0 train-0", "train", None),
    ],
)  # fmt: skip
def test_a_split_is_its_one_file_or_all_its_parts(write, read, names, split, found):
    for name in names.split():
        write(f"set/{name}.jsonl", json.dumps({"answer": name}))
    folder = write("set/README.md", "").parent
    if found is not None:
        assert read(folder, {"answer": Text()}, split=split)["answer"][:] == found.split()
    else:
        with pytest.raises(InputError, match=f"(several files for|parts of) the split '{split}'"):
            read(folder, {"answer": Text()}, split=split)


def test_a_digest_is_of_what_examples_hold(write, read):
    def made(text, features="int32"):
        rows = read(write("a.csv", text))
        features = {"tokens": datasets.List(datasets.Value(features))}
        function = lambda c: {  # noqa: E731
            "tokens": [[ord(x) for x in text] for text in c["question"]],
            "truncated": [False] * len(c["question"]),
        }
        return build_examples(rows, function, features, "key").data

    first = digest(made("question,answer\nab,1\nc,2\n"))
    assert first == digest(made("answer,question\n7,ab\n8,c\n"))
    others = ["a,1\nbc,2", "ab,1\nd,2", "c,2\nab,1", "ab,1", "ab,1\nc,2\nc,2"]
    digests = {digest(made(f"question,answer\n{rows}\n")) for rows in others}
    assert len(digests | {first}) == 6
    assert digest("a", "b") != digest("ab") != digest("a")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/data.jsonl", "there is no file or folder nowhere/data.jsonl"),
        ("./nowhere", "there is no file or folder nowhere"),
        ("a name", "'a name' is no file, no folder and no name"),
        ("nobody/nothing", "nobody/nothing, split 'train': there is no such .*Offline"),
    ],
)
def test_a_source_that_is_none_is_refused_in_one_line(read, source, message):
    with pytest.raises(InputError, match=message) as caught:
        read(source)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(write):
    file = write("a.csv", "question,answer\na,b\n")
    with pytest.raises(InputError, match="the cache .* cannot be used: .* HF_DATASETS_CACHE"):
        readers.read(file, COLUMNS, cache_dir=file / "below-a-file")


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        (
            Label(("no", "yes"), missing=("-",)),
            {"yes": 1, "0": 0, 1: 1, "-": None},
            ["Yes", 2, "-1", 0.5, None, True, [], "1.5"],
        ),
        (Number(0, 5), {"2.5": 2.5, 5: 5.0, 0.0: 0.0}, ["", 5.01, "nan", None, True, "x", [1]]),
        (Text(), {"a": "a", 1: "1", 1.5: "1.5"}, [None, [], {}]),
        (
            Messages(),
            {},
            [None, "hi", [], ["hi"], [{"role": "user"}], [{"role": 1, "content": ""}]],
        ),
    ],
)
def test_columns_hold_what_they_should(column, good, bad):
    for value, parsed in good.items():
        assert column.parse(value) == parsed
    for value in bad:
        with pytest.raises(InputError, match="^(is|has no text) "):
            column.parse(value)


def test_examples_are_made_once_and_losses_counted(write, read):
    rows = read(write("a.csv", "question,answer\n" + "".join(f"{'x' * n},1\n" for n in range(6))))
    features = {"tokens": datasets.List(datasets.Value("int32"))}
    calls = []

    def function(columns):
        calls.append(len(columns["question"]))
        kept = [text for text in columns["question"] if text]
        return {
            "tokens": [[7] * min(len(t), 3) for t in kept],
            "truncated": [len(t) > 3 for t in kept],
        }

    for _ in range(2):
        examples = build_examples(rows, function, features, "first")
        assert (examples.truncated, examples.dropped) == (2, 1)
        assert [row["tokens"].tolist() for row in examples.data] == [
            [7] * n for n in (1, 2, 3, 3, 3)
        ]
    assert calls == [6]
    build_examples(rows, function, features, "second")
    assert calls == [6, 6]
    with pytest.raises(InputError, match="none of the 1 rows became an example"):
        build_examples(rows.select([0]), function, features, "first")
