"""What an adapted step must not cost, by witnesses that no busy machine disturbs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax.interpreter import jax_versions
from tests.benchmarks import decoder, methods, trace_time

# Every size is one of its kind, so that a shape tells what an array is.
TINY = decoder.Decoder(
    layers=5, width=24, heads=3, kv_heads=1, head_dim=8, hidden=40, batch=2, length=20
)
# Weights far larger than activations, so that a copy of a weight stands out.
HEAVY = decoder.Decoder(
    layers=3, width=256, heads=4, kv_heads=4, head_dim=64, hidden=640, batch=1, length=4
)
ADAPTERS = 8


def shapes_of(config):
    """The decoder's weights, its input and its scale vectors, as ShapeDtypeStructs."""
    params = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    x = jax.ShapeDtypeStruct((config.batch, config.length, config.width), config.dtype)
    scales = jax.eval_shape(lambda: ha.init(ha.plan(params, decoder.TARGET)))
    return params, x, scales


@functools.cache
def compiled(name, remat):
    """One method's training step at the benchmark's CPU size, compiled and not run."""
    config = dataclasses.replace(decoder.SMALL, remat=remat)
    params, x, _ = shapes_of(config)
    return methods.lower(name, config, params, x, optax.sgd(1e-3))[0].compile()


def flops(name, remat):
    return compiled(name, remat).cost_analysis()["flops"]


def temp_bytes(name, remat):
    return compiled(name, remat).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_flops_of_the_frozen_floor(remat):
    ratio = flops("HyperAdapt, adapt", remat) / flops(methods.FLOOR, remat)
    assert 1 < ratio <= 1.03
    assert ratio < flops("LoRA r=16", remat) / flops(methods.FLOOR, remat)


def test_flops_under_full_remat():
    """The last product of a block is recomputed too: its row's gradient needs its result."""
    config = decoder.SMALL
    rows, cols = decoder.shapes(config)["down"]
    down = 2 * config.layers * config.batch * config.length * rows * cols
    rest = flops("HyperAdapt, adapt", "full") - down
    assert rest / flops(methods.FLOOR, "full") <= 1.03


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_temporary_memory_is_below_loras(remat):
    assert temp_bytes("HyperAdapt, adapt", remat) < temp_bytes("LoRA r=16", remat)


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside its equations."""
    for eqn in jax_versions.open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(param, "eqns"):
                yield from equations(param)


def weight_sized(name, config):
    """(primitive, shape) of every equation of a training step whose result is a weight's shape."""
    optimizer = optax.sgd(1e-3)
    params, x, _ = shapes_of(config)
    step, start = methods.train_step(name, config, optimizer)
    trained = jax.eval_shape(start, params)
    state = jax.eval_shape(optimizer.init, trained)
    kernels = {
        pair
        for rows, cols in decoder.shapes(config).values()
        for pair in ((rows, cols), (cols, rows))
    }
    stacked = {(config.layers, *pair) for pair in kernels}
    return {
        (eqn.primitive.name, out.aval.shape)
        for eqn in equations(jax.make_jaxpr(step)(trained, state, params, x, x))
        for out in eqn.outvars
        if out.aval.shape in kernels | stacked
    }


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gradient_or_product_of_a_weights_size(remat):
    config = dataclasses.replace(TINY, remat=remat)
    assert weight_sized("HyperAdapt, adapt", config) == set()
    # The same search finds what other methods do.
    assert ("mul", (5, 24, 40)) in weight_sized("HyperAdapt, merge", config)
    assert ("dot_general", (24, 40)) in {
        (primitive, tuple(sorted(shape)))
        for primitive, shape in weight_sized("full fine-tuning", config)
    }


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_adapters_under_vmap_share_the_weights(remat):
    config = dataclasses.replace(HEAVY, remat=remat)
    params, x, scales = shapes_of(config)
    scales = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((ADAPTERS, *leaf.shape), leaf.dtype), scales
    )
    sizes = {rows * cols for rows, cols in decoder.shapes(config).values()}

    def step(name):
        forward = methods.method(name, config).forward
        loss = lambda scales, params, x: jnp.sum(forward(scales, params, x) ** 2)  # noqa: E731
        lowered = jax.jit(jax.vmap(jax.grad(loss), (0, None, None))).lower(scales, params, x)
        return lowered.compile()

    def copies(program):
        """Arrays in the program that hold one weight, or all layers of it, per adapter."""
        found = set()
        for dims in re.findall(r"\bf32\[([\d,]+)\]", program.as_text()):
            shape = [int(n) for n in dims.split(",")]
            size = functools.reduce(lambda a, b: a * b, shape)
            if ADAPTERS in shape and {size // ADAPTERS, size // ADAPTERS // config.layers} & sizes:
                found.add(dims)
        return found

    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    adapted = step("HyperAdapt, adapt")
    assert copies(adapted) == set()
    assert adapted.memory_analysis().temp_size_in_bytes < 2 * weights
    merged = step("HyperAdapt, merge")
    assert copies(merged)
    assert merged.memory_analysis().temp_size_in_bytes > ADAPTERS * weights / 2


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_every_target_is_scaled_on_activations(scan, remat):
    config = dataclasses.replace(TINY, remat=remat, scan=scan)
    params = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    plan = ha.plan(params, decoder.TARGET if scan else decoder.UNROLLED_TARGET)
    forward = ha.adapt(lambda params, x: decoder.forward(params, x, config))
    x = jnp.zeros((config.batch, config.length, config.width))
    report = ha.explain(forward, params, jax.eval_shape(lambda: ha.init(plan)), x)
    assert set(report.on_activations) == {weight.path for weight in plan.weights}
    assert len(plan.weights) == len(decoder.LINEARS) * (1 if scan else config.layers)
    assert report.materialized == () and report.unused == ()


def test_tracing_and_lowering_time():
    """Processor time, which a busy machine does not stretch; the better of two medians."""
    config = dataclasses.replace(decoder.SMALL, layers=32)
    every = trace_time.pairs(config)
    del every[trace_time.ABOVE_FLOOR]
    best = dict.fromkeys(every, float("inf"))
    for _ in range(2):
        measured = trace_time.measure(every, repeats=7)
        best = {what: min(best[what], trace_time.ratio(measured[what])) for what in best}
        if max(best.values()) <= 1.5:
            break
    assert max(best.values()) <= 1.5, best


@functools.cache
def tiny():
    """A decoder to train: its configuration, weights, input, target, and loss before."""
    config = dataclasses.replace(TINY, layers=2)
    x, target = (jax.random.normal(jax.random.key(i), (2, 20, 24)) for i in (1, 2))
    params = jax.jit(lambda key: decoder.init(key, config))(jax.random.key(0))
    base = jax.jit(lambda params, x: decoder.forward(params, x, config))(params, x)
    return config, params, x, target, float(methods.loss_of(base, target))


@pytest.mark.parametrize(
    "name", [n for n in methods.METHODS if n not in (methods.FLOOR, "LoRA r=16")]
)
def test_every_method_starts_at_the_base_and_learns(name):
    """The benchmark compares like with like: one function at the start, and a loss that falls."""
    config, params, x, target, before = tiny()
    optimizer = optax.adam(1e-2)
    try:
        step, start = methods.train_step(name, config, optimizer)
        trained, step = jax.jit(start)(params), jax.jit(step)
        state, losses = optimizer.init(trained), []
        for _ in range(4):
            trained, state, loss = step(trained, state, params, x, target)
            losses.append(float(loss))
    except methods.Unavailable as reason:
        pytest.skip(str(reason))
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[-1] < losses[0]
