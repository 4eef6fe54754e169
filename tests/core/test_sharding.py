"""The vectors' shardings out of the weights', on eight CPU devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from hyperadapt_jax.scales import side_axes
from hyperadapt_jax.sharding import vector_shardings, vector_spec

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


# Roles, shape, the weight's spec, the vectors' (row, col), and these with "data" replicated. One
# letter per mesh axis, "d" for data and "m" for model; None where there is no vector.
WEIGHTS = [
    ("in out", (8, 6), "d m", ("m", "d"), ("m", "-")),
    ("out in", (6, 8), "m d", ("m", "d"), ("m", "-")),
    ("in out", (8, 6), "", ("-", "-"), ("-", "-")),
    ("in out", (8, 6), "d", ("-", "d"), ("-", "-")),
    ("in out", (6, 8), "- dm", ("dm", "-"), ("m", "-")),
    ("stack in out", (3, 8, 6), "- d m", ("- m", "- d"), ("- m", "- -")),
    ("stack in out", (4, 8, 6), "d - m", ("d m", "d -"), ("- m", "- -")),
    ("in out out", (8, 2, 3), "d m -", ("m -", "d"), ("m -", "-")),
    ("in in out", (2, 3, 8), "m - d", ("d", "m -"), ("-", "m -")),
    ("stack in out out", (3, 8, 2, 3), "- d m -", ("- m -", "- d"), ("- m -", "- -")),
    ("- - in out", (3, 3, 8, 4), "- - d m", ("m", "d"), ("m", "-")),
    ("- out", (8, 6), "d m", ("m", None), ("m", None)),
    ("in -", (8, 6), "d m", (None, "d"), (None, "-")),
]


def spec_of(letters):
    names = {"-": None, "d": "data", "m": "model", "dm": ("data", "model")}
    return None if letters is None else P(*(names[word] for word in letters.split()))


def same(sharding, mesh, spec):
    return sharding is None if spec is None else sharding == NamedSharding(mesh, spec)


@KINDS
@pytest.mark.parametrize("roles, shape, spec, like, whole", WEIGHTS)
def test_vectors_are_sharded_as_their_axes(kind, roles, shape, spec, like, whole):
    mesh, spec = mesh_of(kind), spec_of(spec)
    params = {"w": jax.device_put(jnp.ones(shape, jnp.bfloat16), NamedSharding(mesh, spec))}
    for replicate, want in (((), like), (("data",), whole)):
        want = tuple(map(spec_of, want))
        plan = ha.plan(params, ha.Target("w", roles), replicate=replicate)
        scales = ha.init(plan)
        for side, expected in zip(("row", "col"), want, strict=True):
            delta = getattr(scales["w"], side)
            assert same(plan.weights[0].shardings.get(side), mesh, expected)
            assert (delta is None) == (expected is None)
            if delta is not None:
                assert delta.sharding == NamedSharding(mesh, expected)
                assert delta.dtype == jnp.float32 and not np.any(delta)
        # A low-rank term as vectors on its axes; the rank's own axis is whole.
        low_rank = ha.init(plan.with_low_rank(2), jax.random.key(0))["w"]
        for side in ("down", "up"):
            found, axes = getattr(low_rank, side), side_axes(roles, side)
            if axes:
                at = vector_spec(spec, axes, replicate)
                assert found.sharding.is_equivalent_to(NamedSharding(mesh, at), found.ndim)
        # The same out of every form in which the weights' shardings can be given.
        abstract = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), params
        )
        for weights in (params, abstract, {"w": NamedSharding(mesh, spec)}):
            got = vector_shardings(scales, weights, replicate)["w"]
            assert same(got.row, mesh, want[0]) and same(got.col, mesh, want[1])
        got = vector_shardings(scales, {"w": spec}, replicate)["w"]
        assert (got.row, got.col) == want


@KINDS
def test_put_in_place_and_the_optimizer_follows(kind):
    mesh = mesh_of(kind)
    params = {"w": jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("data", "model")))}
    loaded = {"w": ha.ScaleVectors(np.arange(6.0), np.arange(8.0), "in out")}
    placed = jax.device_put(loaded, vector_shardings(loaded, params, ["data"]))
    assert placed["w"].row.sharding == NamedSharding(mesh, P("model"))
    assert placed["w"].col.sharding == NamedSharding(mesh, P(None))
    np.testing.assert_array_equal(placed["w"].row, np.arange(6.0))
    with jax.set_mesh(mesh):
        state = optax.adam(1e-3).init(placed)
        for moment in (state[0].mu, state[0].nu):
            assert moment["w"].row.sharding == placed["w"].row.sharding
            assert moment["w"].col.sharding.is_equivalent_to(placed["w"].col.sharding, 1)


def test_a_plan_of_explicitly_sharded_shapes_allocates_nothing_and_places_its_vectors():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(
            lambda: {"w": jax.sharding.reshard(jnp.ones((8, 6)), P("data", "model"))}
        )
        scales = ha.init(ha.plan(params, ("w", "in out")))
    assert scales["w"].row.sharding == NamedSharding(mesh, P("model"))


def test_the_plan_prints_the_specs():
    mesh = mesh_of(AxisType.Auto)
    params = {"w": jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("data", "model")))}
    lines = str(ha.plan(params, ("w", "in out"), replicate=["data"])).splitlines()
    assert lines[0].split()[-4:] == ["row", "spec", "col", "spec"]
    assert "'model'" in lines[1] and "'data'" not in lines[1]


def test_vectors_live_in_device_memory_where_the_weight_may_not():
    mesh = mesh_of(AxisType.Auto)
    away = NamedSharding(mesh, P("data", "model"), memory_kind="pinned_host")
    scales = {"w": ha.ScaleVectors(jnp.zeros(6), jnp.zeros(8), "in out")}
    near = NamedSharding(mesh, P("model"))
    assert vector_shardings(scales, {"w": away})["w"].row.memory_kind == near.memory_kind


def test_one_device():
    params = {"w": jnp.ones((8, 6))}
    scales = ha.init(ha.plan(params, ("w", "in out"), replicate=["data"]))
    shardings = vector_shardings(scales, params, ["data"])
    assert isinstance(shardings["w"].row, SingleDeviceSharding)
    assert jax.device_put(scales, shardings)["w"].row.sharding == params["w"].sharding


def test_specs_of_a_linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("data", "model"))
            return nn.Dense(6, kernel_init=init)(x)

    boxed = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 8)))
    scales = ha.init(ha.plan(boxed, (["Dense_0/kernel"], "in out")))
    got = vector_shardings(scales, nn.get_partition_spec(boxed))["params/Dense_0/kernel"]
    assert (got.row, got.col) == (P("model"), P("data"))
    got = vector_shardings(scales, nn.get_sharding(boxed, mesh_of(AxisType.Auto)))
    assert got["params/Dense_0/kernel"].row.spec == P("model")


def test_specs_of_an_nnx_model():
    init = nnx.with_partitioning(nnx.initializers.ones, ("data", "model"))
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        state = nnx.state(nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0)))
    scales = ha.init(ha.plan(state, ("kernel", "in out")))
    for weights in (nnx.get_partition_spec(state), nnx.get_named_sharding(state, mesh)):
        row = vector_shardings(scales, weights)["kernel"].row
        assert getattr(row, "spec", row) == P("model")


def test_errors():
    mesh = mesh_of(AxisType.Auto)
    params = {"w": jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P("data", "model")))}
    scales = ha.init(ha.plan(params, ("w", "in out")))
    for replicate in (["batch"], "data"):
        with pytest.raises(ValueError, match=r"axes of the mesh \('data', 'model'\)"):
            vector_shardings(scales, params, replicate)
        with pytest.raises(ValueError, match=r"axes of the mesh \('data', 'model'\)"):
            ha.plan(params, ("w", "in out"), replicate=replicate)
    with pytest.raises(ValueError, match="w: is not in the tree; .*nearest: v"):
        vector_shardings(scales, {"v": P()})
    with pytest.raises(ValueError, match="w: has a sharding of type NoneType; .*NamedSharding"):
        vector_shardings(scales, {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)})


def test_spec_shorter_than_the_weight():
    assert vector_spec(P(("data", "model")), (0, 2), ["model"]) == P("data", None)
