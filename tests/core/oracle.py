"""The oracle of every `adapt` test: the same function on the merged weights, in float32."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import hyperadapt_jax as ha
from hyperadapt_jax import paths

TOLERANCE = 1e-5  # relative, as a norm over each array


def normal(rng, shape):
    """Normal numbers by NumPy, in float32: JAX would compile a program for each shape."""
    return rng.standard_normal(shape, np.float32)


def draw(seed, *shape, dtype=jnp.float32):
    """Normal numbers, scaled as an initializer would where there are two axes or more."""
    fan = shape[-2] if len(shape) > 1 else 1
    return jnp.asarray(normal(np.random.default_rng(seed), shape) / np.sqrt(fan), dtype)


def random_scales(scales, seed=7, size=0.3):
    """The same tree with random deltas: small enough to keep programs tame, of either sign."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * normal(rng, x.shape), jnp.float32), scales)


def error(got, want):
    """The largest relative error over two trees' arrays, each as a norm, in float64."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    errors = [0.0]
    for x, y in pairs:
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors.append(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3))
    return max(errors)


def loss(out):
    """A scalar that every number of the output moves, each differently."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(
        (
            jnp.sum(jnp.sin(x.astype(jnp.float32) + jnp.arange(x.size).reshape(x.shape)))
            for x in leaves
        ),
        start=jnp.float32(0),
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def with_low_rank(plan):
    """The same plan with a term of rank 2 for each weight that can have one, next to its vectors.

    Codes are left out: none of these tests' weights is its codes' product with one number.
    """
    weights = [
        dataclasses.replace(w, rank=2) if jnp.issubdtype(w.dtype, jnp.inexact) else w
        for w in plan.weights
    ]
    return dataclasses.replace(plan, weights=tuple(weights))


def check_adapt(
    fn,
    params,
    targets,
    *args,
    differentiable=True,
    exact=True,
    tolerance=TOLERANCE,
    low_rank="as the vectors",
):
    """Compares adapt(fn) with fn on merged weights; returns the explanation.

    Outputs, gradients with respect to the vectors and to the floating arguments, and, at zero
    deltas, the bits of the output in float32 and in bfloat16. Then the same with a low-rank term
    for each weight, which is on the activations where the vectors are, or "materialized".
    """
    plan = ha.plan(params, *targets)
    zeros = ha.init(plan)
    # An Equinox module has leaves that are no arrays.
    arrays, build = paths.partition_arrays(params)
    forward = ha.adapt(fn, materialize="allow")

    def merged(scales, *args):
        return fn(ha.merge(params, scales), *args)

    if differentiable:
        moving = [i for i, x in enumerate(args) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
        over = (0, *(i + 1 for i in moving))

        def measured(fn):
            def loss_and_out(scales, *args):
                out = fn(scales, *args)
                return loss(out), out

            return jax.jit(jax.grad(loss_and_out, over, has_aux=True))
    else:
        measured = jax.jit
    explanations = []
    # The gradients with the term are those of the vectors too; without it, outputs are enough.
    of_vectors = measured if low_rank == "materialized" else jax.jit
    for planned, compared in ((plan, of_vectors), (with_low_rank(plan), measured)):
        scales = random_scales(jax.eval_shape(partial(ha.init, planned, jax.random.key(0))))
        ours, theirs = compared(lambda *args: forward(params, *args)), compared(merged)
        assert error(ours(scales, *args), theirs(scales, *args)) <= tolerance
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explanations.append(ha.explain(forward, params, scales, *args))
    lost, lost_with_both = [set(explained.materialized) for explained in explanations]
    assert lost_with_both <= lost if low_rank == "as the vectors" else lost < lost_with_both
    if exact:
        ours = jax.jit(lambda arrays, zeros, *args: forward(build(arrays), zeros, *args))
        base = jax.jit(lambda arrays, *args: fn(build(arrays), *args))
        for inputs in ((arrays, *args), jax.tree.map(to_bf16, (arrays, *args))):
            assert bits(ours(inputs[0], zeros, *inputs[1:])) == bits(base(*inputs))
    return explanations[0]


def to_bf16(x):
    inexact = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16) if inexact else x
