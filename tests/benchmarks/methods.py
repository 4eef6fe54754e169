"""Ways to train a decoder, each as one training step to be measured: HyperAdapt and its rivals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from tests.benchmarks import decoder

FLOOR = "frozen floor"
METHODS = (
    FLOOR,
    "HyperAdapt, adapt",
    "HyperAdapt, merge",
    "LoRA r=8",
    "LoRA r=8, adapt",
    "LoRA r=16",
    "LoRA r=16, adapt",
    "qwix LoRA r=16",
    "DoRA r=16, adapt",
    "HiRA r=1",
    "full fine-tuning",
)

ADAPTERS: dict[str, ha.methods.Method] = {
    "HyperAdapt, adapt": ha.methods.HyperAdapt(),
    "HyperAdapt, merge": ha.methods.HyperAdapt(),
    "LoRA r=8, adapt": ha.methods.LoRA(rank=8),
    "LoRA r=16, adapt": ha.methods.LoRA(rank=16),
    "DoRA r=16, adapt": ha.methods.DoRA(rank=16),
    "HiRA r=1": ha.methods.HiRA(rank=1),
}


class Unavailable(Exception):
    """A method that cannot run here, and why."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """What trains, and the model's output.

    Attributes:
      start: ``start(params)`` makes what trains, fresh, from the decoder's weights.
      forward: ``forward(trained, params, x)``, x: [B, T, D] to [B, T, D].
    """

    start: Callable[[Any], Any]
    forward: Callable[[Any, Any, jax.Array], jax.Array]


def method(name: str, config: decoder.Decoder, seed: int = 2) -> Contender:
    """A method by its name in METHODS (the floor, which trains nothing, is a step alone)."""
    base = lambda params, x: decoder.forward(params, x, config)  # noqa: E731
    if name == "full fine-tuning":
        # A copy, for a step gives away the buffers of what it trains.
        start = lambda params: jax.tree.map(jnp.copy, params)  # noqa: E731
        return Contender(start, lambda trained, params, x: base(trained, x))
    if name in ADAPTERS:
        key = jax.random.key(seed)
        return _adapter(ADAPTERS[name], base, config, key, merged=name.endswith("merge"))
    kind, _, rank = name.rpartition(" r=")
    makers = {"LoRA": _lora, "qwix LoRA": _qwix_lora}
    if kind not in makers:
        raise ValueError(f"unknown method {name!r}: use {', '.join(METHODS)}")
    return makers[kind](config, jax.random.key(seed), int(rank))


def _adapter(
    method: ha.methods.Method,
    base: Callable[..., jax.Array],
    config: decoder.Decoder,
    key: jax.Array,
    merged: bool,
) -> Contender:
    """A method of the library, on the activations or with its weights multiplied out."""
    target = decoder.TARGET if config.scan else decoder.UNROLLED_TARGET
    adapted = ha.adapt(base, materialize="error")

    def start(params):
        return method.init(key, method.select(ha.plan(params, target)), params)

    def forward(trained, params, x):
        scales, made = method.scales(trained, params), method.weights(trained, params)
        if made:
            return base(paths.replace(params, made), x)
        return base(ha.merge(params, scales), x) if merged else adapted(params, scales, x)

    return Contender(start, forward)


def _lora(config: decoder.Decoder, key: jax.Array, rank: int) -> Contender:
    """LoRA (arXiv 2106.09685) on every linear: A uniform in +-1/sqrt(in), B zero, alpha = 2 r.

    A and B are float32 and multiply in the activations' dtype, as in mixed-precision training.
    """

    def factors(key, shape):
        rows, cols = shape
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(key, (rows, rank), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((rank, cols))}

    def layer(key):
        keys = jax.random.split(key, len(decoder.LINEARS))
        shapes = decoder.shapes(config).items()
        return {name: factors(k, shape) for k, (name, shape) in zip(keys, shapes, strict=True)}

    def start(params):
        keys = jax.random.split(key, config.layers)
        return jax.vmap(layer)(keys) if config.scan else [layer(key) for key in keys]

    def linear(weights, x):
        low = x @ weights["a"].astype(x.dtype)
        return x @ weights["kernel"] + 2.0 * (low @ weights["b"].astype(x.dtype))

    def forward(trained, params, x):
        layers = params["layers"]
        if config.scan:
            layers = _beside(layers, trained)
        else:
            layers = [_beside(*pair) for pair in zip(layers, trained, strict=True)]
        return decoder.forward(params | {"layers": layers}, x, config, linear)

    return Contender(start, forward)


def _beside(layer: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """A layer's weights, with what trains besides the kernel that it changes."""
    return layer | {name: layer[name] | trained[name] for name in trained}


def _qwix_lora(config: decoder.Decoder, key: jax.Array, rank: int) -> Contender:
    """qwix's LoRA on the same decoder in Linen, whose parameters are the very same tree.

    Raises:
      Unavailable: qwix is not installed, or cannot run on this JAX; says which.
    """
    if not config.scan:
        raise Unavailable("measured on the scanned decoder only")
    try:
        import qwix
    except ImportError as error:
        raise Unavailable(f"pip install 'hyperadapt-jax[bench]' first ({error})") from None
    # The scan's own name is the first part of a module's path.
    rule = qwix.LoraRule(
        module_path=rf"layers/({'|'.join(decoder.LINEARS)})", rank=rank, alpha=2.0 * rank
    )
    x = jax.ShapeDtypeStruct((config.batch, config.length, config.width), config.dtype)
    try:
        model = qwix.apply_lora_to_model(LinenDecoder(config), qwix.LoraProvider([rule]))
        layers = jax.eval_shape(model.init, key, x)["params"]["layers"]
    except Exception as error:  # a rival's failure is a line in the table, not the end of it
        raise Unavailable(f"qwix {qwix.__version__}: {type(error).__name__}: {error}") from error
    missing = [name for name in decoder.LINEARS if "kernel_lora_a" not in layers[name]]
    if missing:
        raise Unavailable(f"qwix {qwix.__version__} put no LoRA on {', '.join(missing)}")

    def start(params):
        trained = {}
        for i, name in enumerate(decoder.LINEARS):
            a, b = (layers[name][f"kernel_lora_{side}"] for side in "ab")
            bound = 1 / math.sqrt(a.shape[-2])
            fold = jax.random.fold_in(key, i)
            trained[name] = {
                "kernel_lora_a": jax.random.uniform(fold, a.shape, a.dtype, -bound, bound),
                "kernel_lora_b": jnp.zeros(b.shape, b.dtype),
            }
        return trained

    def forward(trained, params, x):
        layers = _beside(params["layers"], trained)
        return model.apply({"params": params | {"layers": layers}}, x)

    return Contender(start, forward)


class _LinenBlock(nn.Module):
    config: decoder.Decoder

    @nn.compact
    def __call__(self, x, _):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        weights = {
            name: nn.Dense(cols, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)
            for name, (_, cols) in decoder.shapes(config).items()
        }
        for name in ("attention_norm", "mlp_norm"):
            weights[name] = self.param(name, nn.initializers.ones, (config.width,), dtype)
        return decoder.block(weights, x, config, lambda dense, x: dense(x)), None


class LinenDecoder(nn.Module):
    """The decoder as a Linen module, for libraries that work on modules."""

    config: decoder.Decoder

    @nn.compact
    def __call__(self, x):
        block = _LinenBlock
        if self.config.remat != "none":
            policy = decoder.POLICIES[self.config.remat]
            block = nn.remat(block, policy=policy, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.layers,
        )
        x, _ = layers(self.config, name="layers")(x, None)
        dtype = jnp.dtype(self.config.dtype)
        return decoder.rms_norm(
            x, self.param("norm", nn.initializers.ones, (self.config.width,), dtype)
        )


def loss_of(y: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error, in float32."""
    return jnp.mean(jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)))


def train_step(
    name: str, config: decoder.Decoder, optimizer: optax.GradientTransformation
) -> tuple[Callable, Callable]:
    """One method's ``step(trained, state, params, x, target)``, and its ``start(params)``.

    A step returns what trains and the optimizer's state, both updated, and the loss. The floor's
    trains nothing: it is the loss and its gradient to the input, what any method pays that trains
    something in every layer and computes no weight's gradient.
    """
    if name == FLOOR:

        def floor(trained, state, params, x, target):
            loss = lambda x: loss_of(decoder.forward(params, x, config), target)  # noqa: E731
            return trained, state, jax.value_and_grad(loss)(x)

        return floor, lambda params: ()

    chosen = method(name, config)

    def step(trained, state, params, x, target):
        loss, grads = jax.value_and_grad(
            lambda trained: loss_of(chosen.forward(trained, params, x), target)
        )(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step, chosen.start


def lower(
    name: str,
    config: decoder.Decoder,
    params: Any,
    x: jax.Array,
    optimizer: optax.GradientTransformation,
) -> tuple[jax.stages.Lowered, Callable]:
    """A method's step, lowered with what trains and its state donated, and its ``start(params)``.

    Args:
      name: one of METHODS.
      config: the decoder's.
      params, x: the decoder's weights and its input, as arrays or ShapeDtypeStructs.
      optimizer: of what trains, the same for every method.

    Raises:
      Unavailable: the method cannot run here.
    """
    step, start = train_step(name, config, optimizer)
    trained = jax.eval_shape(start, params)
    state = jax.eval_shape(optimizer.init, trained)
    return jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, params, x, x), start
