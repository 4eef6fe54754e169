"""The interpreter's tables name primitives: a misspelt name would silently materialize a weight."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from hyperadapt_jax import paths
from hyperadapt_jax.interpreter import codes, jax_versions, rules
from hyperadapt_jax.interpreter.interpreter import KEEPS_ZEROS
from tests.core import test_adapt, test_adapt_quantized, test_adapt_rules

X, N = jnp.ones((8, 4)), jnp.arange(8)
SPLIT = PartitionSpec("d")
OTHERS = [  # what no case of the other files holds
    lambda: [jnp.ceil(X), X <= 1, X**X, lax.erf_inv(X), lax.reduce_precision(X, 5, 10)],
    lambda: [abs(N), jnp.minimum(N, 3), ~N, N ^ 3, N | 3, lax.population_count(N), lax.clz(N)],
    lambda: [jax.device_put(X), lax.dynamic_update_slice(X, X[:2], (0, 0))],
    lambda: jax.grad(lambda x: jnp.sum(jnp.sin(x) + x * x))(X),  # add_any
    lambda: on_a_mesh(lambda x: lax.ppermute(x, "d", [(0, 1)])),
    lambda: on_a_mesh(all_gather),
    lambda: on_a_mesh(functools.partial(all_gather, to="invarying"), PartitionSpec()),
    lambda: on_a_mesh(lambda x: x + lax.pcast(jnp.ones(4), "d", to="varying")),
]


def on_a_mesh(fn, out=SPLIT):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=SPLIT, out_specs=out)(X)


def all_gather(x, **kwargs):
    return lax.all_gather(x, "d", tiled=True, **kwargs)


def names(jaxpr):
    """The name of every primitive in a jaxpr and in those inside it."""
    for eqn in jax_versions.open_jaxpr(jaxpr)[0].eqns:
        yield jax_versions.name_of(eqn)
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(param, "eqns"):
                yield from names(param)


@pytest.fixture(scope="module")
def found():
    traced = [jax.make_jaxpr(fn)() for fn in OTHERS]
    for case in [*test_adapt.CASES.values(), *test_adapt_rules.CASES.values()]:
        arrays, build = paths.partition_arrays((case.params, *case.args))
        leaves = lambda xs, fn=case.fn, build=build: jax.tree.leaves(fn(*build(xs)))  # noqa: E731
        traced.append(jax.make_jaxpr(leaves)(arrays))
    for array, dequantize in test_adapt_quantized.DEQUANTIZE.values():
        traced.append(jax.make_jaxpr(dequantize)(array))
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))):
        traced.append(jax.make_jaxpr(lambda x: jax.sharding.reshard(x, SPLIT))(X))
    return {name for jaxpr in traced for name in names(jaxpr)}


TABLES = {
    "rules": rules.RULES,
    "steps of a decoding": codes._ON_CODES,
    "steps of a decoding, on integers": codes._ON_INTEGERS,
    "keep zeros": KEEPS_ZEROS,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_name_is_a_primitives(found, table):
    assert set(TABLES[table]) - found == set()
