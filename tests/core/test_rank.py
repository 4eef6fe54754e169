"""The rank of updates against closed forms, and the report that people read."""

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperadapt_jax as ha
from hyperadapt_jax import rank
from hyperadapt_jax.rank import Measures, analyze, bound, figure, measure

RNG = np.random.default_rng(0)


def low_rank(n, m, r):
    return RNG.normal(size=(n, r)) @ RNG.normal(size=(r, m))


def vectors(weight, axes, scale=0.3, sides="both"):
    """Random scale vectors for a weight."""
    rng = np.random.default_rng(1)
    zeros = ha.init(ha.plan({"w": jnp.asarray(weight)}, ("w", axes), sides=sides))["w"]
    row, col = (
        None if side is None else jnp.asarray(scale * rng.normal(size=side.shape), jnp.float32)
        for side in (zeros.row, zeros.col)
    )
    return {"w": ha.ScaleVectors(row, col, zeros.axes)}


def spectrum(report, source="update", index=()):
    (found,) = [s for s in report.spectra if s.source == source and s.index == index]
    return found


# The measures


def test_measures_of_an_identity_are_its_size():
    found = measure(np.ones(7), tolerance=1e-7)
    assert found == Measures(7**0.5, 7.0, pytest.approx(7.0), 7, 7, 7, 7, 7, 7)


def test_measures_of_a_geometric_spectrum():
    """s = 1, 1/2, 1/4 ...: sum s = 2, sum s**2 = 4/3, entropy of p = 2 log 2."""
    s = 0.5 ** np.arange(60)
    found = measure(RNG.permutation(s), tolerance=1e-7)
    assert found.norm == pytest.approx((4 / 3) ** 0.5)
    assert found.stable == pytest.approx(4 / 3)
    assert found.entropy == pytest.approx(4.0)
    # 2**-3 > 0.1 > 2**-4, 2**-6 > 0.01 > 2**-7, 2**-9 > 0.001 > 2**-10, 2**-23 > 1e-7 > 2**-24
    assert (found.above_10, found.above_1, found.above_01, found.numerical) == (4, 7, 10, 24)
    # The first k hold 1 - 4**-k of the energy.
    assert (found.energy_90, found.energy_99) == (2, 4)


def test_a_share_of_the_energy_that_is_met_exactly_counts_no_value_more():
    assert measure(np.ones(10), 0.0).energy_90 == 9
    assert measure(np.ones(100), 0.0).energy_99 == 99
    assert measure([3.0, 1.0], 0.0).energy_90 == 1


@pytest.mark.parametrize("values", [[], [0.0], np.zeros(5)])
def test_measures_of_nothing_are_zero(values):
    assert measure(values, tolerance=1e-7) == Measures()


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8), st.floats(0.001, 1000))
def test_measures_are_ordered_and_do_not_depend_on_the_scale(values, scale):
    found = measure(values, tolerance=0.0)
    again = measure(np.asarray(values) * scale, tolerance=0.0)
    if any(values):
        slack = 1 + 1e-9
        assert 1 <= found.stable <= found.entropy * slack <= found.numerical * slack**2
        assert 1 <= found.above_10 <= found.above_1 <= found.above_01 <= found.numerical
        assert 1 <= found.energy_90 <= found.energy_99 <= found.numerical
    assert again.stable == pytest.approx(found.stable, rel=1e-6)
    assert again.entropy == pytest.approx(found.entropy, rel=1e-6)


# The bound


@pytest.mark.parametrize("base, update", [(5, 10), (20, 40), (40, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bound_is_attained(base, update, dtype):
    weight = low_rank(64, 64, base).astype(dtype)
    found = analyze({"w": weight}, vectors(weight, "in out"))
    assert spectrum(found, "base").measures.numerical == base
    for source in ("update", "random"):
        assert spectrum(found, source).measures.numerical == update
        assert spectrum(found, source).bound == bound(base, (64, 64)) == update


@pytest.mark.parametrize("side", ["row", "col"])
def test_one_side_alone_is_bounded_by_the_rank_of_the_weight(side):
    weight = low_rank(30, 20, 6).astype(np.float32)
    found = spectrum(analyze({"w": weight}, vectors(weight, "in out", sides=side)))
    assert found.measures.numerical == found.bound == bound(6, (30, 20), sides=1) == 6


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.data())
def test_no_update_exceeds_the_bound(n, m, r, both, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    weight = rng.normal(size=(n, min(r, n, m))) @ rng.normal(size=(min(r, n, m), m))
    row, col = (jnp.asarray(rng.normal(size=k), jnp.float32) for k in (m, n))
    scales = ha.ScaleVectors(row, col if both else None, "in out" if both else "- out")
    found = spectrum(analyze({"w": weight}, {"w": scales}))
    assert found.bound == min((1 + both) * min(r, n, m), n, m)
    # Far from the float64 tolerance: what lies between is neither noise nor rank.
    assert np.sum(found.singular_values > 1e-11 * np.linalg.norm(weight)) <= found.bound


# The update


def test_the_update_is_that_of_the_definition():
    """Against A W B - W with explicit diagonal matrices, outputs x inputs."""
    weight = RNG.normal(size=(6, 4)).astype(np.float32)
    scales = vectors(weight, "out in")
    a, b = (np.diag(1 + np.asarray(v, np.float64)) for v in (scales["w"].row, scales["w"].col))
    expected = np.linalg.svd(a @ weight @ b - weight, compute_uv=False)
    found = spectrum(analyze({"w": weight}, scales))
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-12)
    assert found.shape == (6, 4) and found.singular_values.dtype == np.float64
    assert found.measures.norm == pytest.approx(np.linalg.norm(a @ weight @ b - weight))


def test_tiny_deltas_on_a_bf16_weight_are_not_rounding_noise():
    """A merged bf16 weight would not move at all, or would differ by noise of full rank."""
    weight = jnp.asarray(np.ones((32, 32)), jnp.bfloat16)
    row = jnp.full(32, 1e-6, jnp.float32).at[0].set(3e-6)
    found = spectrum(analyze({"w": weight}, {"w": ha.ScaleVectors(row, None, "- out")}))
    assert found.measures.numerical == 1
    assert found.measures.norm == pytest.approx(np.linalg.norm(row) * 32**0.5, rel=1e-6)


def test_rounding_a_low_rank_weight_to_bf16_adds_nothing_to_its_rank():
    weight = jnp.asarray(low_rank(128, 96, 5), jnp.bfloat16)
    report = analyze({"w": weight}, vectors(weight, "in out"))
    assert spectrum(report, "base").measures.numerical == 5
    assert spectrum(report).measures.numerical == 10


def test_a_stack_is_one_matrix_per_slice():
    weight = RNG.normal(size=(4, 2, 5, 3)).astype(np.float32)  # in, stack, out, stack
    scales = vectors(weight, "in stack out stack")
    report = analyze({"w": weight}, scales)
    assert len(report.spectra) == 3 * 6
    row, col = (np.asarray(v, np.float64) for v in (scales["w"].row, scales["w"].col))
    for i in range(2):
        for j in range(3):
            update = weight[:, i, :, j] * (np.outer(1 + col[:, i, j], 1 + row[i, :, j]) - 1)
            found = spectrum(report, index=(i, j))
            expected = np.linalg.svd(update, compute_uv=False)
            np.testing.assert_allclose(found.singular_values, expected, rtol=1e-12)
            assert found.shape == (5, 4)


@pytest.mark.parametrize(
    "sizes, axes, shape",
    [
        ((2, 3, 4), "in out out", (12, 2)),
        ((2, 3, 4), "out out in", (6, 4)),
        ((2, 3, 5, 4), "- - in out", (4, 30)),
        ((2, 3, 4), "- out -", (3, 8)),
        ((2, 3, 4), "- in -", (8, 3)),
        ((6,), "out", (6, 1)),
    ],
)
def test_several_axes_are_flattened_to_a_matrix(sizes, axes, shape):
    weight = RNG.normal(size=sizes).astype(np.float32)
    scales = vectors(weight, axes)
    found = spectrum(analyze({"w": weight}, scales))
    assert found.shape == shape and len(found.singular_values) == min(shape)
    update = np.asarray(ha.merge({"w": weight}, scales)["w"]) - weight
    assert found.measures.norm == pytest.approx(np.linalg.norm(update), rel=1e-5)


def test_no_training_no_rank():
    weight = RNG.normal(size=(3, 4)).astype(np.float32)
    report = analyze({"w": weight}, ha.init(ha.plan({"w": weight}, ("w", "in out"))))
    assert spectrum(report).measures == spectrum(report, "random").measures == Measures()
    assert spectrum(report).bound == 3
    figure(report)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_one_row_one_column(shape):
    weight = np.ones(shape, np.float32)
    report = analyze({"w": weight}, vectors(weight, "in out"))
    for source in ("update", "random", "base"):
        found = spectrum(report, source)
        assert found.measures.numerical == found.measures.energy_99 == 1
        assert found.measures.stable == pytest.approx(1)
        assert len(found.singular_values) == 1
    figure(report)


# The controls


def test_random_vectors_have_the_norm_of_the_trained_ones_and_the_seed_fixes_them():
    weight = np.eye(5, dtype=np.float32)
    scales = vectors(weight, "- out", scale=2.0)

    def random(seed):
        return spectrum(analyze({"w": weight}, scales, seed=seed), "random").singular_values

    # Of an identity, the singular values of (A - I) I are the entries of a - 1.
    assert np.linalg.norm(random(0)) == pytest.approx(np.linalg.norm(scales["w"].row))
    np.testing.assert_array_equal(random(0), random(0))
    assert np.abs(random(0) - random(1)).max() > 1e-3


def test_random_vectors_do_not_depend_on_what_else_is_analyzed():
    params = {"a": np.eye(3, dtype=np.float32), "b": np.eye(3, dtype=np.float32)}
    one = vectors(params["a"], "in out")["w"]
    both, alone = analyze(params, {"a": one, "b": one}), analyze(params, {"b": one})
    first, second, third = (
        next(s for s in report.spectra if s.path == path and s.source == "random")
        for report, path in [(both, "b"), (alone, "b"), (both, "a")]
    )
    np.testing.assert_array_equal(first.singular_values, second.singular_values)
    assert np.abs(first.singular_values - third.singular_values).max() > 1e-3


def test_dense_controls_stand_beside_the_update():
    weight = RNG.normal(size=(12, 8)).astype(np.float32)
    lora = jnp.asarray(low_rank(12, 8, 2), jnp.float32)
    report = analyze(
        {"w": weight, "v": weight}, {**vectors(weight, "in out")}, {"lora": {"w": lora}}
    )
    found = spectrum(report, "lora")
    assert found.measures.numerical == 2 and found.bound is None
    assert found.singular_values[:2] == pytest.approx(np.linalg.svd(lora)[1][:2], rel=1e-5)
    assert [s.source for s in report.spectra] == ["update", "lora", "random", "base"]


# What is refused


def test_analyze_says_what_is_wrong_and_where():
    weight = np.ones((3, 4), np.float32)
    params, scales = {"dense": {"w": weight}}, {"dense/w": vectors(weight, "in out")["w"]}
    with pytest.raises(ValueError, match="dense/w: is scaled .* none .*; nearest: dens/w"):
        analyze({"dens": {"w": weight}}, scales)
    with pytest.raises(ValueError, match="lora: dense: is not adapted; nearest: dense/w"):
        analyze(params, scales, {"lora": {"dense": weight}})
    with pytest.raises(
        ValueError, match=r"lora: dense/w: has shape \(4, 3\), but the weight has \(3, 4\)"
    ):
        analyze(params, scales, {"lora": {"dense/w": weight.T}})
    with pytest.raises(ValueError, match="base: is a name that the report uses itself"):
        analyze(params, scales, {"base": {}})
    with pytest.raises(ValueError, match="dense/w: has dtype int8, not a floating one"):
        analyze({"dense": {"w": weight.astype(np.int8)}}, scales)
    with pytest.raises(ValueError, match="dense/w: has 3 axes, .* roles for 2: 'in out'"):
        analyze({"dense": {"w": weight[None]}}, scales)
    broken = weight.copy()
    broken[1, 1] = np.nan
    with pytest.raises(ValueError, match="base: dense/w: has a NaN"):
        analyze({"dense": {"w": broken}}, scales)
    with pytest.raises(ValueError, match="row: dense/w: has a NaN"):
        analyze(params, {"dense/w": ha.ScaleVectors(jnp.full(4, jnp.nan), None, "- out")})
    with pytest.raises(ValueError, match="lora: dense/w: has a NaN"):
        analyze(params, scales, {"lora": {"dense/w": broken}})


# The report


@pytest.fixture(scope="module")
def report():
    params = {
        "layers": [{"q": RNG.normal(size=(6, 6)).astype(np.float32)} for _ in range(3)],
        "low": low_rank(6, 8, 2).astype(np.float32),
    }
    scales = {f"layers/{i}/q": vectors(params["layers"][i]["q"], "in out")["w"] for i in range(3)}
    scales["low"] = vectors(params["low"], "in out")["w"]
    return analyze(params, scales, {"LoRA": {"layers/1/q": low_rank(6, 6, 1)}})


def test_the_table_has_the_medians_of_each_kind(report):
    lines = [line.split() for line in str(report).splitlines()]
    header, rows = lines[0], lines[1:]
    assert header[:4] == ["weight", "matrix", "count", "source"] and header[-1] == "bound"
    assert [row[:4] for row in rows] == [
        ["layers/*/q", "6x6", "3", "update"],
        ["layers/*/q", "6x6", "3", "random"],
        ["layers/*/q", "6x6", "3", "base"],
        ["layers/*/q", "6x6", "1", "LoRA"],
        ["low", "8x6", "1", "update"],
        ["low", "8x6", "1", "random"],
        ["low", "8x6", "1", "base"],
    ]
    stable = [s.measures.stable for s in report.spectra if s.source == "base"][:3]
    assert float(rows[2][header.index("stable")]) == pytest.approx(np.median(stable), rel=1e-3)
    assert rows[4][-2:] == ["4", "4"] and rows[6][-2:] == ["2", "-"]


def test_only_whole_numbers_in_a_path_are_layers():
    def kind(path):
        return rank.Spectrum(path, (), "base", (1, 1), None, np.ones(1), Measures()).kind

    assert kind("h/0/mlp/12") == "h/*/mlp/*" and kind("0/1") == "*/*"
    assert kind("conv1/w") == "conv1/w" and kind("layer_3/q2") == "layer_3/q2"


def test_the_figure_has_a_panel_per_kind_and_a_legend_inside_the_page(report, tmp_path):
    drawn = figure(report, columns=1)
    assert [ax.get_title(loc="left") for ax in drawn.axes] == ["layers/*/q", "low"]
    top, low = drawn.axes
    (line,) = [line for line in top.get_lines() if line.get_label() == "update"]
    spectra = [s.singular_values for s in report.spectra if s.source == "update"][:3]
    middle = np.median([s / s[0] for s in spectra], axis=0)
    np.testing.assert_allclose(line.get_ydata(), middle)
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 7) / 6)
    ends = {line.get_label(): line.get_xdata()[-1] for line in low.get_lines()}
    assert ends["frozen weight"] == pytest.approx(2 / 6)
    assert ends["update"] == ends["bound on the rank"] == pytest.approx(4 / 6)
    (legend,) = drawn.legends
    labels = ["update", "random arrays", "frozen weight", "LoRA", "bound on the rank"]
    assert [text.get_text() for text in legend.get_texts()] == labels
    drawn.savefig(tmp_path / "rank.png")
    inside = legend.get_window_extent()
    assert 0 <= inside.x0 and inside.x1 <= drawn.bbox.x1 and inside.y1 <= drawn.bbox.y1
    drawn.savefig(tmp_path / "rank.svg")
    assert ElementTree.parse(tmp_path / "rank.svg").getroot().tag.endswith("svg")


def test_the_figure_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="report is empty"):
        figure(analyze({"w": np.ones((2, 2))}, {}))


def test_without_matplotlib_the_figure_says_how_to_get_it_and_the_rest_works():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import numpy as np
import hyperadapt_jax as ha
row = np.ones(2, np.float32)
report = ha.rank.analyze({"w": np.eye(2)}, {"w": ha.ScaleVectors(row, None, "- out")})
print(report)
try:
    ha.rank.figure(report)
except ImportError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "update" in done.stdout and "pip install 'hyperadapt-jax[plot]'" in done.stdout


def test_another_adapter_is_a_control_slice_by_slice():
    """As its dense update is; LoRA's has the rank that it was given, and the bound knows it."""
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 9)), jnp.float32)}
    plan = ha.plan(params, ("w", "stack in out"))
    vectors = {"w": ha.ScaleVectors(jnp.ones((2, 9)) / 3, jnp.ones((2, 12)) / 5, "stack in out")}
    low = ha.init(plan.with_low_rank(2), jax.random.key(0))["w"]
    low = dataclasses.replace(low, up=jnp.ones(low.up.shape).at[..., 1].set(jnp.arange(9.0)))
    dense = jnp.einsum("lir,lor->lio", low.down, low.up)
    found = ha.rank.analyze(params, vectors, {"lora": {"w": low}, "dense": {"w": dense}})
    for index in ((0,), (1,)):
        one, two = (spectrum(found, name, index) for name in ("lora", "dense"))
        np.testing.assert_allclose(one.singular_values, two.singular_values, rtol=1e-4, atol=1e-5)
        assert one.measures.numerical == 2
    alone = ha.rank.analyze(params, {"w": low})
    assert spectrum(alone, index=(0,)).bound == spectrum(alone, index=(0,)).measures.numerical == 2
    assert spectrum(alone, "random", (0,)).measures.norm > 0
    other = ha.ScaleVectors(jnp.ones(9), None, "- - out")
    with pytest.raises(ValueError, match="other: w: has other stack axes"):
        ha.rank.analyze(params, vectors, {"other": {"w": other}})


def test_the_device_decomposes_in_float32():
    """The same singular values to float32's precision, and the same ranks."""
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((20, 9)), jnp.float32)}
    plan = ha.plan(params, ("w", "in out")).with_low_rank(3, ["row"])
    scales = jax.tree.map(lambda x: x + 0.1, ha.init(plan, jax.random.key(0)))
    host, device = (ha.rank.analyze(params, scales, on_device=d) for d in (False, True))
    for one, two in zip(host.spectra, device.spectra, strict=True):
        largest = one.singular_values[0]
        np.testing.assert_allclose(
            two.singular_values, one.singular_values, rtol=1e-5, atol=1e-6 * largest
        )
        assert one.measures.numerical == two.measures.numerical and one.bound == two.bound
