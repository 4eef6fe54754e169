"""The method protocol, and a method set up on a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hyperadapt_jax import paths
from hyperadapt_jax.adapt import adapt
from hyperadapt_jax.adapter import Adapter
from hyperadapt_jax.plan import Plan
from hyperadapt_jax.scales import Scales, compute_dtype
from hyperadapt_jax.trainable import combine, split
from hyperadapt_jax.trainable import labels as label_tree


@dataclasses.dataclass(frozen=True)
class Method:
    """A fine-tuning method. This base class trains nothing; a subclass overrides what differs.

    Its fields are its options. What it trains for the weights is a pytree of float32 arrays whose
    initial values leave the model equal to the base, bit for bit.
    """

    @property
    def summary(self) -> str:
        """What trains, in a few words."""
        raise NotImplementedError

    @property
    def targets(self) -> str:
        """The preset of `hyperadapt_jax.models.targets` that is meant where none is named."""
        return "all-linear"

    def select(self, plan: Plan) -> Plan | None:
        """Returns the part of the plan that it adapts; None where it adapts no weight."""
        return None

    def init(self, key: jax.Array | None, plan: Plan, params: Any) -> Any:
        """Returns the initial values of what trains for the weights.

        Args:
          key: for random initial values; None for a method without any.
          plan: what :meth:`select` gave.
          params: the frozen parameters, arrays or ``jax.ShapeDtypeStruct``.
        """
        return {}

    def scales(self, trained: Any, params: Any) -> Scales:
        """Returns the arrays that adapt each weight, for `hyperadapt_jax.adapt` and `merge`."""
        return trained

    def dropped(self, scales: Scales, key: jax.Array) -> Scales:
        """Returns what :meth:`scales` gave as a training step uses it, with dropout."""
        return scales

    def weights(self, trained: Any, params: Any) -> dict[str, jax.Array]:
        """Returns the weights that it makes itself, by path: at the cost of arrays of their size.

        For what is no sum and product of scale vectors and low-rank terms.
        """
        return {}

    def full(self, params: Mapping[str, Any], head: Callable[[str], bool]) -> Iterable[str]:
        """Returns the paths of the parameters that train fully.

        Args:
          params: all parameters by path.
          head: whether a path belongs to the model's head.
        """
        return ()

    def labels(self, trained: Any) -> Any:
        """Returns each trained array's label, the name of its field, for ``optax.partition``."""
        return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].name, trained)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """A method set up on a model, as a trainer uses it.

    Attributes:
      forward: ``forward(trainable, frozen, *args, **kwargs)``, the model's outputs.
      fn: ``fn(params, *args, **kwargs)``, the frozen model's.
      trainable: what trains, float32: under ``"scales"`` what the method trains for the weights,
        under ``"full"`` other parameters by path.
      frozen: the rest; `hyperadapt_jax.trainable.combine` puts both together.
      labels: a label for each trainable array, for ``optax.partition``: the method's, or ``full``.
      method: the method.
      plan: the weights that it adapts; None where it adapts none.
    """

    forward: Callable[..., Any]
    fn: Callable[..., Any]
    trainable: dict[str, Any]
    frozen: Any
    labels: dict[str, Any]
    method: Method
    plan: Plan | None

    @property
    def count(self) -> int:
        """The number of trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))

    def adapter(self, trainable: Any) -> tuple[Scales, dict[str, jax.Array]]:
        """Returns what an adapter holds: what adapts each weight, and what trained fully, by path.

        A weight that the method makes itself is one that trained fully.
        """
        params, trained = combine(trainable, self.frozen)
        made = self.method.weights(trained, params)
        made = {path: w.astype(compute_dtype(w.dtype)) for path, w in made.items()}
        return self.method.scales(trained, params), {**trainable["full"], **made}

    def training(self, key: jax.Array) -> Tuning:
        """The same with the method's dropout, which a key draws; for a loss that is trained on."""
        return dataclasses.replace(self, forward=_forward(self.method, self.fn, key))


def tune(
    method: Method,
    fn: Callable[..., Any],
    params: Any,
    plan: Plan,
    *,
    full: paths.Pattern | None = None,
    head: paths.Pattern | None = None,
    key: jax.Array | None = None,
) -> Tuning:
    """Sets up a method on a model, given arrays or only their shapes.

    Args:
      method: what trains.
      fn: ``fn(params, *args)``, as for `hyperadapt_jax.adapt`.
      params: the frozen parameters, any pytree of arrays or of ``jax.ShapeDtypeStruct``; of shapes,
        nothing is allocated, and what trains and what is frozen are shapes too, with the shardings
        that the arrays would have.
      plan: the targeted weights.
      full: what else trains fully, a regular expression or suffixes of paths.
      head: which parameters are the model's head, likewise.
      key: for methods with random initial values.

    Raises:
      PlanError: a pattern that matches nothing; what trains fully is scaled, tied or an integer.

    >>> import hyperadapt_jax as ha, jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 2)), "head": jnp.ones(2)}
    >>> fn = lambda params, x: x @ params["w"] * params["head"]
    >>> tuning = tune(ha.methods.HyperAdapt(), fn, params, ha.plan(params, ("w", "in out")))
    >>> tuning.count, tuning.forward(tuning.trainable, tuning.frozen, jnp.ones(3))
    (5, Array([3., 3.], dtype=float32))
    """
    is_head = paths.matcher(head) if head else lambda path: False
    chosen = [re.escape(path) for path in method.full(paths.arrays(params), is_head)]
    chosen += [] if full is None else [_regex(full)]
    selected = method.select(plan)

    def start(params: Any) -> tuple[dict[str, Any], Any]:
        trained = method.init(key, selected, params) if selected else {}
        return split(params, trained, full="|".join(chosen) or None)

    shapes_alone = isinstance(next(iter(jax.tree.leaves(params)), None), jax.ShapeDtypeStruct)
    if shapes_alone:
        trainable, frozen = jax.eval_shape(start, params)
        trainable, frozen = _placed(trainable, frozen, params, selected)
    else:
        trainable, frozen = start(params)
    labels = {
        "scales": method.labels(trainable["scales"]),
        "full": dict.fromkeys(trainable["full"], "full"),
    }
    forward = _forward(method, fn)
    return Tuning(forward, fn, trainable, frozen, labels, method, selected)


def restore(
    fn: Callable[..., Any], params: Any, adapter: Adapter, replicate: Sequence[str] = ()
) -> Tuning:
    """Sets up on a model what an adapter holds, whichever method trained it.

    Args:
      fn: ``fn(params, *args)``, as for :func:`tune`.
      params: the base's parameters, arrays.
      adapter: the adapter, which fits them.
      replicate: mesh axes along which the vectors of sharded weights are kept whole, as for
        `hyperadapt_jax.plan`.
    """
    adapter.check(params)
    adapter, method = adapter.placed(params, replicate), Method()
    pattern = "|".join(map(re.escape, adapter.full)) or None
    trainable, frozen = split(params, adapter.scales, full=pattern)
    trainable["full"] = dict(adapter.full)
    return Tuning(_forward(method, fn), fn, trainable, frozen, label_tree(trainable), method, None)


def _forward(
    method: Method, fn: Callable[..., Any], key: jax.Array | None = None
) -> Callable[..., Any]:
    transformed = adapt(fn)

    def forward(trainable: Any, frozen: Any, *args: Any, **kwargs: Any) -> Any:
        params, trained = combine(trainable, frozen)
        scales = method.scales(trained, params)
        if key is not None:
            scales = method.dropped(scales, key)
        if made := method.weights(trained, params):
            params = paths.replace(params, made)
        if not scales:
            return fn(params, *args, **kwargs)
        return transformed(params, scales, *args, **kwargs)

    return forward


def _placed(
    trainable: dict[str, Any], frozen: Any, params: Any, plan: Plan | None
) -> tuple[dict[str, Any], Any]:
    """The same shapes, with the shardings that arrays would have: a parameter, its own, and what
    the method trains for a weight, what the plan says; what the plan does not name has none."""
    own = {path: paths.named_sharding(leaf) for path, leaf in paths.arrays(params).items()}
    planned = {weight.path: weight.shardings for weight in plan.weights} if plan else {}

    def like(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def of_method(keys: Any, leaf: Any) -> Any:
        path, name = keys[0].key, getattr(keys[-1], "name", "")
        return like(leaf, planned.get(path, {}).get(name))

    placed = {
        "scales": jax.tree_util.tree_map_with_path(of_method, trainable["scales"]),
        "full": {path: like(leaf, own[path]) for path, leaf in trainable["full"].items()},
    }
    kept = {path: like(leaf, own[path]) for path, leaf in paths.arrays(frozen).items()}
    return placed, paths.replace(frozen, kept)


def _regex(pattern: paths.Pattern) -> str:
    if isinstance(pattern, str):
        return f"(?:{pattern})"
    return "|".join(f"(?:.*/)?{re.escape(suffix)}" for suffix in pattern)
