"""An adapted step on meshes of eight CPU devices: its numbers, and its compiled collectives.

The model is a scanned stack of decoder-like blocks in plain ``jnp``. Its step, differentiated with
respect to the scale vectors, is held against the base's: the frozen forward pass and the gradient
of the input. The adapted program may add reductions of arrays no larger than the largest vector or,
with low-rank terms, than the largest side of one.
"""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from hyperadapt_jax.sharding import vector_shardings

L, B, T, D, N, H, F = 3, 16, 8, 24, 8, 4, 48
WEIGHTS = {  # shape, axis roles, and the roles of the mesh axes that shard it
    "q": ((L, D, N, H), "stack in out out", (None, "fsdp", "model", None)),
    "o": ((L, N, H, D), "stack in in out", (None, "model", None, "fsdp")),
    "up": ((L, D, F), "stack in out", (None, "fsdp", "model")),
    "down": ((L, F, D), "stack in out", (None, "model", "fsdp")),
}
LARGEST_VECTOR = L * F  # up's rows; the smallest shard of activations has B * T * D / 8 numbers
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
POLICIES = jax.checkpoint_policies


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the mesh axes that shard the batch, the weights (fsdp) and the model."""

    mesh: dict
    batch: tuple = ()
    fsdp: str | None = None
    model: str | None = None

    def make(self, kind):
        axis_types = (kind,) * len(self.mesh)
        return jax.make_mesh(tuple(self.mesh.values()), tuple(self.mesh), axis_types=axis_types)

    def weight(self, name, gathered=False):
        """The spec of a weight, or of one layer of it as it is used."""
        axes = {None: None, "fsdp": None if gathered else self.fsdp, "model": self.model}
        return P(*(axes[role] for role in WEIGHTS[name][2][gathered:]))

    def activation(self):
        return P(self.batch or None, None, None)


LAYOUTS = {
    "8-data": Layout({"data": 8}, batch=("data",)),
    "8-tensor": Layout({"model": 8}, model="model"),
    "8-fsdp": Layout({"data": 8}, batch=("data",), fsdp="data"),
    "4x2-data-tensor": Layout({"data": 4, "model": 2}, batch=("data",), model="model"),
    "4x2-fsdp-tensor": Layout({"data": 4, "model": 2}, ("data",), "data", "model"),
    "2x2x2": Layout({"data": 2, "fsdp": 2, "model": 2}, ("data", "fsdp"), "fsdp", "model"),
}


def forward(params, x, layout=None, kind=AUTO, policy=None):
    """x: [B, T, D], through L blocks of attention and MLP; remat under the policy where given."""

    def place(y, spec):
        if layout is None:
            return y
        if kind == EXPLICIT:
            return jax.sharding.reshard(y, spec)
        return jax.lax.with_sharding_constraint(y, spec)

    def sums(subscripts, x, w):  # a product that sums over a sharded axis
        spec = layout and layout.activation()
        if layout and kind == EXPLICIT:
            return jnp.einsum(subscripts, x, w, out_sharding=spec)
        return place(jnp.einsum(subscripts, x, w), spec)

    def block(x, p):
        if layout:
            p = {name: place(w, layout.weight(name, gathered=True)) for name, w in p.items()}
        q = jnp.einsum("btd,dnh->btnh", x, p["q"])
        scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, q))
        mixed = jnp.einsum("bnts,bsnh->btnh", scores, q)
        x = x + sums("btnh,nhd->btd", mixed, p["o"])
        return x + sums("btf,fd->btd", jax.nn.gelu(x @ p["up"]), p["down"]), None

    if policy is not None:
        block = jax.checkpoint(block, policy=policy)
    return jnp.mean(jax.lax.scan(block, x, params)[0] ** 2)


def inputs(rank=None):
    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    rng = np.random.default_rng(0)
    params = {name: 0.1 * normal(*shape) for name, (shape, _, _) in WEIGHTS.items()}
    plan = ha.plan(params, *((name, roles) for name, (_, roles, _) in WEIGHTS.items()))
    plan = plan if rank is None else plan.with_low_rank(rank, ("row", "col"))
    zeros = ha.init(plan, jax.random.key(0))
    scales = jax.tree.map(lambda delta: 0.1 * normal(*delta.shape), zeros)
    return params, scales, normal(B, T, D)


def step_of(fn):
    forward = ha.adapt(fn, materialize="error")
    return jax.value_and_grad(lambda scales, params, x: forward(params, scales, x))


@functools.cache
def on_one_device(rank=None):
    params, scales, x = inputs(rank)
    return compile(step_of(forward), scales, params, x)(scales, params, x)


def collectives(compiled):
    """Every array that the program's collectives return: (kind, shape), counted."""
    kinds = "|".join(
        ["all-gather", "all-reduce", "reduce-scatter"]
        + ["all-to-all", "collective-permute", "collective-broadcast"]
    )
    found = collections.Counter()
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            found[kind, tuple(map(int, filter(None, dims.split(","))))] += 1
    return found


def compile(fn, *args):
    """Compiled with less effort on the machine code, which no test here looks at."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn).lower(*args).compile(compiler_options=options)


def place(layout, mesh, replicate, rank=None):
    params, scales, x = inputs(rank)
    named = functools.partial(NamedSharding, mesh)
    params = jax.device_put(params, {name: named(layout.weight(name)) for name in WEIGHTS})
    scales = jax.device_put(scales, vector_shardings(scales, params, replicate))
    return params, scales, jax.device_put(x, named(layout.activation()))


def compile_both(fn, params, scales, x):
    """The base's program, with the gradient of its input, and the adapted one."""
    base = compile(jax.value_and_grad(lambda x, params: fn(params, x)), x, params)
    return base, compile(step_of(fn), scales, params, x)


def added(base, adapted):
    """What the adapted program's collectives return beyond the base's, of which none may go."""
    of_base, of_adapted = collectives(base), collectives(adapted)
    assert not of_base - of_adapted
    return of_adapted - of_base


def kinds(found):
    return {kind for kind, _ in found}


def large(found, rank=None):
    """Those that return more numbers than the largest vector, or side of a low-rank term, has."""
    most = LARGEST_VECTOR * (rank or 1)
    return {key: n for key, n in found.items() if math.prod(key[1]) > most}


def assert_close(got, want):
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * np.abs(two).max())


def assert_sharded_alike(got, want):
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, two.ndim)


@pytest.mark.parametrize(
    "name, kind, rank",
    [(name, AUTO, None) for name in LAYOUTS]
    + [(name, EXPLICIT, None) for name in ("8-fsdp", "4x2-data-tensor", "2x2x2")]
    + [("8-tensor", AUTO, 2), ("4x2-fsdp-tensor", AUTO, 2), ("2x2x2", EXPLICIT, 2)],
)
def test_adds_only_reductions_of_vectors(name, kind, rank):
    layout = LAYOUTS[name]
    mesh = layout.make(kind)
    with jax.set_mesh(mesh):
        params, scales, x = place(layout, mesh, layout.batch, rank)
        fn = functools.partial(forward, layout=layout, kind=kind)
        base, adapted = compile_both(fn, params, scales, x)
        loss, grads = adapted(scales, params, x)
    extra = added(base, adapted)
    assert kinds(extra) <= {"all-reduce", "reduce-scatter"} and not large(extra, rank), extra
    # Where all devices share the batch, there is nothing to reduce but sums over ranks.
    assert bool(extra) == bool(layout.batch or rank)
    assert_close((loss, grads), on_one_device(rank))
    assert_sharded_alike(grads, scales)


@pytest.mark.parametrize("policy", ["dots_with_no_batch_dims_saveable", "nothing_saveable"])
def test_under_remat(policy):
    layout = LAYOUTS["4x2-data-tensor"]
    mesh = layout.make(AUTO)
    with jax.set_mesh(mesh):
        params, scales, x = place(layout, mesh, replicate=layout.batch)
        fn = functools.partial(forward, layout=layout, policy=getattr(POLICIES, policy))
        base, adapted = compile_both(fn, params, scales, x)
        result = adapted(scales, params, x)
    assert_close(result, on_one_device())
    extra = added(base, adapted)
    assert kinds(extra) == {"all-reduce"}
    # With nothing saved, a block's last product is computed, and summed over the model's axis, once
    # more: the gradient of its row needs it, and the gradient of the input alone does not.
    again = {("all-reduce", (B // 4, T, D)): 1}
    assert large(extra) == (again if policy == "nothing_saveable" else {})


def test_replicate_saves_the_gathers_of_vectors():
    layout = LAYOUTS["4x2-fsdp-tensor"]
    mesh = layout.make(AUTO)
    fn = functools.partial(forward, layout=layout)
    programs, results = {}, {}
    with jax.set_mesh(mesh):
        for replicate in ((), layout.batch):
            params, scales, x = place(layout, mesh, replicate)
            programs[replicate] = compile(step_of(fn), scales, params, x)
            results[replicate] = programs[replicate](scales, params, x)
    assert_close(results[()], on_one_device())
    assert_close(results[layout.batch], on_one_device())
    gathers = added(programs[layout.batch], programs[()])
    assert kinds(gathers) == {"all-gather"} and not large(gathers)
    assert gathers.total() >= len(WEIGHTS)  # each weight has one vector along its sharded axis


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_a_train_step_keeps_its_shardings(kind):
    layout = LAYOUTS["4x2-fsdp-tensor"]
    mesh = layout.make(kind)
    optimizer = optax.adam(1e-3)
    fn = step_of(functools.partial(forward, layout=layout, kind=kind))

    def step(scales, state, params, x):
        loss, grads = fn(scales, params, x)
        updates, state = optimizer.update(grads, state, scales)
        return optax.apply_updates(scales, updates), state, loss

    with jax.set_mesh(mesh):
        params, scales, x = place(layout, mesh, replicate=layout.batch)
        state = optimizer.init(scales)
        program = compile(step, scales, state, params, x)
        losses = []
        for _ in range(3):  # a compiled program refuses what is sharded in another way
            scales, state, loss = program(scales, state, params, x)
            losses.append(loss)
    assert losses[0] > losses[1] > losses[2]
    assert_sharded_alike(scales, place(layout, mesh, replicate=layout.batch)[1])


def local_forward(params, x, layout):
    """The forward pass as one device of a shard_map computes it; x: [B / data, T, D]."""

    def whole(name, w):
        axes = WEIGHTS[name][2][1:]
        if layout.fsdp is None:
            return w
        return jax.lax.all_gather(w, layout.fsdp, axis=axes.index("fsdp"), tiled=True)

    def block(x, p):
        p = {name: whole(name, w) for name, w in p.items()}
        q = jnp.einsum("btd,dnh->btnh", x, p["q"])
        scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, q))
        mixed = jnp.einsum("bnts,bsnh->btnh", scores, q)
        x = x + jax.lax.psum(jnp.einsum("btnh,nhd->btd", mixed, p["o"]), layout.model)
        return x + jax.lax.psum(jax.nn.gelu(x @ p["up"]) @ p["down"], layout.model), None

    return jax.lax.pmean(jnp.mean(jax.lax.scan(block, x, params)[0] ** 2), layout.batch)


@pytest.mark.parametrize(
    "name, where, rank",
    [
        ("4x2-data-tensor", "inside", None),
        ("4x2-fsdp-tensor", "inside", None),
        ("4x2-fsdp-tensor", "inside", 2),
        ("4x2-fsdp-tensor", "around", None),
        ("4x2-fsdp-tensor", "around", 2),
    ],
)
def test_shard_map(name, where, rank):
    layout = LAYOUTS[name]
    mesh = layout.make(AUTO)
    local = functools.partial(local_forward, layout=layout)
    specs = {name: layout.weight(name) for name in WEIGHTS}
    batch = layout.activation()
    with jax.set_mesh(mesh):
        params, scales, x = place(layout, mesh, (), rank)
        base = jax.shard_map(local, in_specs=(specs, batch), out_specs=P())
        if where == "around":
            forward = ha.adapt(base, materialize="error")
        else:
            forward = jax.shard_map(
                ha.adapt(local, materialize="error"),
                in_specs=(specs, vector_shardings(scales, specs), batch),
                out_specs=P(),
            )
        step = jax.value_and_grad(lambda scales, params, x: forward(params, scales, x))
        adapted = compile(step, scales, params, x)
        base = compile(jax.value_and_grad(lambda x, params: base(params, x)), x, params)
        loss, grads = adapted(scales, params, x)
    extra = added(base, adapted)
    # What the body gathers of a weight, it gathers of the weight's vectors.
    gathers = {"all-gather"} if layout.fsdp else set()
    assert not large(extra, rank)
    assert kinds(extra) <= {"all-reduce", "reduce-scatter", *gathers}, extra
    assert_close((loss, grads), on_one_device(rank))
    assert_sharded_alike(grads, scales)
