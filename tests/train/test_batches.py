"""Batches: what comes out is what went in, in a seeded order, whatever the rows' form."""

import itertools
import json

import datasets
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from hyperadapt_jax import models
from train.data.batches import IGNORE, Batches, length_buckets, stream
from train.errors import InputError

VOCABULARY = 50


def make_examples(sizes, seed=0):
    """Decoder examples of the given numbers of tokens; the first label of each is ignored."""
    rng = np.random.default_rng(seed)
    examples = []
    for size in sizes:
        tokens = rng.integers(1, VOCABULARY, size)
        labels = np.append(tokens[1:], 0)
        labels[0] = IGNORE
        examples.append({"tokens": tokens, "labels": labels})
    return examples


def examples_of(batch, name):
    """``(number of the example, its values)`` for all examples of a batch."""
    for i, numbers in enumerate(batch["example_ids"]):
        for segment, number in enumerate(np.atleast_1d(numbers)):
            if number >= 0:
                place = batch["mask"][i]
                if "segment_ids" in batch:
                    place = place & (batch["segment_ids"][i] == segment + 1)
                yield int(number), batch[name][i][place].tolist()


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a
    )


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    batch_size=st.integers(1, 7),
    pack=st.sampled_from([None, 20, 33]),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_each_epoch_holds_every_example_once_and_unchanged(sizes, batch_size, pack, shuffle, seed):
    examples = make_examples(sizes)
    batches = Batches(
        examples, batch_size, lengths=[4, 8, 20], pack=pack, seed=seed, shuffle=shuffle, epochs=2
    )
    for epoch in range(2):
        seen = []
        for i in range(batches.per_epoch):
            batch = with_ids(batches, epoch * batches.per_epoch + i)
            assert batch["tokens"].shape[0] == batches.batch_size <= batch_size
            assert batch["tokens"].shape[1] in ([pack] if pack else [4, 8, 20])
            assert not batch["tokens"][~batch["mask"]].any()
            assert (batch["labels"][~batch["mask"]] == IGNORE).all()
            assert batch["weight"].tolist() == batch["mask"].any(axis=1).tolist()
            values = zip(examples_of(batch, "tokens"), examples_of(batch, "labels"), strict=True)
            for (number, tokens), (_, labels) in values:
                seen.append(number)
                assert tokens == examples[number]["tokens"].tolist()
                assert labels == examples[number]["labels"].tolist()
        assert sorted(seen) == list(range(len(sizes)))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    examples = make_examples([3, 9, 5, 12, 7] * 8)
    batches = Batches(examples, 4, seed=1, epochs=3)
    again = Batches(examples, 4, seed=1, epochs=3)
    for i in (25, 3, 29, 0, 14):  # in any order, after any other
        assert equal(batches[i], again[i])
    rows = [np.concatenate([b["example_ids"] for b in part]).tolist() for part in by_epoch(batches)]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    other = Batches(examples, 4, seed=2, epochs=3)
    assert not equal(batches[0], other[0])
    assert len(batches) == 30 and equal(batches[-1], batches[29])
    with pytest.raises(IndexError):
        batches[30]


def test_there_are_as_many_epochs_as_steps_need():
    examples = make_examples([3] * 10)
    assert len(Batches(examples, 4, steps=7)) == 9 and len(Batches(examples, 4, steps=3)) == 3
    assert equal(Batches(examples, 4, steps=7)[5], Batches(examples, 4, epochs=2)[5])


def with_ids(batches, i):
    """A batch, and the indices of its examples."""
    return {**batches[i], "example_ids": batches.example_ids(i)}


def by_epoch(batches):
    return [
        [with_ids(batches, i) for i in range(start, start + batches.per_epoch)]
        for start in range(0, len(batches), batches.per_epoch)
    ]


def test_evaluation_goes_through_the_rows_once_and_in_order():
    batches = Batches(make_examples([5] * 7), 3, shuffle=False)
    assert [batches.example_ids(i).tolist() for i in range(3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, -1, -1],
    ]
    assert [b["weight"].tolist() for b in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]


def test_rows_of_similar_length_share_a_batch():
    sizes = np.random.default_rng(0).integers(1, 129, 2000)
    batches = Batches(make_examples(sizes), 16, lengths=[32, 64, 96, 128])
    padded = sum(batch["tokens"].size for batch in batches)
    needed = sum(32 * -(-size // 32) for size in sizes)  # had each row just the length it needs
    assert needed <= padded < 1.02 * needed
    assert len({batch["tokens"].shape for batch in batches}) == 4


def test_a_packed_row_is_tight_and_tells_its_examples_apart():
    sizes = np.random.default_rng(0).integers(1, 60, 500)
    batches = Batches(make_examples(sizes), 8, pack=128)
    rows = sum(int(batch["weight"].sum()) for batch in batches)
    assert rows <= 1.01 * -(-sizes.sum() // 128)
    for batch in itertools.islice(batches, 5):
        for segments, positions, mask in zip(
            batch["segment_ids"], batch["positions"], batch["mask"], strict=True
        ):
            assert ((segments > 0) == mask).all()
            lengths = np.bincount(segments)[1:]
            assert (segments[mask] == np.repeat(np.arange(1, len(lengths) + 1), lengths)).all()
            assert (positions[mask] == np.concatenate([np.arange(n) for n in lengths])).all()
    assert len({batches.example_ids(i).shape for i in range(len(batches))}) == 1


def test_no_form_of_rows_changes_what_a_model_makes_of_an_example():
    config = models.config_from_dict(
        dict(
            model_type="llama",
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    fn, params = models.functional(models.create(config))

    @jax.jit
    def token_losses(batch):
        named = {name: batch.get(name) for name in ("mask", "segment_ids", "positions")}
        logits = fn(params, batch["tokens"], **named)
        labels = jnp.maximum(batch["labels"], 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(batch["labels"] == IGNORE, 0.0, loss)

    def losses(batches):
        """The loss of each example, by its number."""
        batches = [
            {**with_ids(batches, i), "loss": np.asarray(token_losses(batches[i]))}
            for i in range(len(batches))
        ]
        return {n: sum(loss) for batch in batches for n, loss in examples_of(batch, "loss")}

    examples = make_examples([3, 9, 1, 9, 3, 1])
    alone = losses(Batches(examples, 1, lengths=[1, 3, 9]))
    for options in (dict(lengths=[4, 10]), dict(pack=12)):
        found = losses(Batches(examples, 4, **options))
        assert found.keys() == alone.keys() == set(range(6))
        for number, loss in found.items():
            np.testing.assert_allclose(loss, alone[number], rtol=1e-5)


def test_shards_are_the_parts_of_a_batch():
    examples = make_examples([3, 9, 5, 30, 7] * 3)
    whole = Batches(examples, 6, lengths=[10, 30], epochs=2)
    parts = [Batches(examples, 6, lengths=[10, 30], epochs=2, shard=(i, 3)) for i in range(3)]
    for batch, *shards in zip(whole, *parts, strict=True):
        for name in batch:
            assert np.array_equal(batch[name], np.concatenate([shard[name] for shard in shards]))


@pytest.mark.parametrize("pack", [None, 40])
def test_a_data_set_gives_the_batches_of_a_list(pack):
    examples = make_examples([3, 9, 5, 30, 7] * 3)
    rows = [{name: value.tolist() for name, value in row.items()} for row in examples]
    data = datasets.Dataset.from_list(rows).with_format("numpy")
    for a, b in zip(Batches(examples, 4, pack=pack), Batches(data, 4, pack=pack), strict=True):
        assert equal(a, b)
    some = data.select([6, 1, 3])  # a view, whose rows are others than those in memory
    assert [b["mask"].sum() for b in Batches(some, 1, shuffle=False, lengths=[30])] == [9, 9, 30]


def test_numbers_of_a_row_are_gathered():
    examples = [{"tokens": [1] * 4, "label": 0.5 * i} for i in range(3)]
    batch = Batches(examples, 2, shuffle=False)[1]
    assert batch["label"].tolist() == [1.0, 0.0]
    assert batch["label"].dtype == np.float32


def test_a_stream_goes_on_where_its_state_says():
    batches = Batches(make_examples([3, 9, 5, 12, 7] * 4), 4, epochs=3)
    reader = stream(batches)
    for i in range(7):
        assert equal(next(reader), batches[i])
    state = json.loads(json.dumps(reader.get_state()))
    rest = list(reader)
    assert len(rest) == len(batches) - 7
    for one, other, i in zip(rest, stream(batches, state), range(7, 15), strict=True):
        assert equal(one, other) and equal(one, batches[i])


@pytest.mark.parametrize("pack", [None, 20])
def test_no_batch_is_larger_than_the_data(pack):
    """But for what the parts that it is computed in need."""
    for options, rows in ((dict(), 5), (dict(divisor=4), 8), (dict(divisor=2, shard=(1, 3)), 2)):
        batches = Batches(make_examples([11] * 5), 4098, pack=pack, **options)
        assert batches[0]["tokens"].shape[0] == rows and len(batches) == 1
    assert Batches(make_examples([11] * 5), 4, pack=pack, divisor=4).batch_size == 4


def test_examples_are_named_by_where_they_stand():
    examples = [{"tokens": [1]}, {"tokens": [2]}, {"tokens": []}]
    places = ["a:1", "a:3", "b:7"]
    with pytest.raises(InputError, match="^b:7 has no tokens"):
        Batches(examples, 1, places=places)
    batches = Batches(examples[:2], 1, places=places)
    assert batches.where(np.array([[1, -1], [0, 1]])) == "a:1, a:3"
    assert batches.where([0, 1], limit=1) == "a:1 and 1 more"
    assert Batches(examples[:2], 1).where([1]) == "row 1"
    assert Batches(examples[:2], 1).where([1, 0]) == "rows 0, 1"


def test_a_stream_passes_an_error_on():
    batches = Batches([{"tokens": [1, 2], "labels": [1]}], 1)
    with pytest.raises(InputError, match="row 0: labels"):
        next(stream(batches))


def test_few_lengths():
    assert length_buckets(1) == [1]
    assert length_buckets(32) == [32]
    assert length_buckets(512) == [32, 48, 64, 96, 128, 192, 256, 384, 512]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "empty"),
        (datasets.Dataset.from_dict({"tokens": []}), {}, "empty"),
        ([{"tokens": [1]}, {"tokens": []}], {}, "row 1 has no tokens"),
        ([{"tokens": [1]}, {"tokens": [1] * 9}], dict(lengths=[8, 4]), "row 1 has 9 tokens.* 8"),
        ([{"tokens": [1] * 9}], dict(pack=8), "row 0 has 9 tokens.* 8"),
        ([{"tokens": [1]}], dict(batch_size=0), "batch size 0"),
        ([{"tokens": [1]}], dict(epochs=0), "epochs 0"),
        ([{"tokens": [1]}], dict(batch_size=3, shard=(0, 2)), "shard 0 of 2"),
        ([{"tokens": [1]}], dict(batch_size=2, shard=(2, 2)), "shard 2 of 2"),
    ],
)
def test_what_cannot_be_batched_is_refused(examples, options, message):
    with pytest.raises(InputError, match=message):
        Batches(examples, **{"batch_size": 2, **options})


def test_what_cannot_be_packed_is_refused():
    batches = Batches([{"tokens": [1], "label": 1}], 1, pack=4)
    with pytest.raises(InputError, match="row 0: label .* cannot be packed"):
        batches[0]
