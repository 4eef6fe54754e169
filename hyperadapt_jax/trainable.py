"""Trainable and frozen parameters: how to split them, and their labels for optax.

Split the parameters, differentiate with respect to the trainable tree alone, and give the
optimizer that tree alone::

    trainable, frozen = split(params, scales, full="head/.*")

    def loss(trainable, frozen, batch):
        params, scales = combine(trainable, frozen)
        return loss_of(forward(params, scales, batch))

    grads = jax.grad(loss)(trainable, frozen, batch)

Then no frozen weight has a gradient, an update or optimizer state: it is not there. The ways that
keep one tree of everything need more care:

* ``optax.masked(optimizer, mask)`` passes the raw gradients of the leaves that the mask leaves out
  on as their updates, and ``optax.apply_updates`` adds those to the frozen weights.
* ``optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen))`` leaves the weights as they
  are, and allocates the optimizer's state for every one of them.
* ``jax.lax.stop_gradient`` makes a weight's gradient zero, not absent: ``jax.grad`` with respect to
  a tree that holds the weight still returns an array of the weight's size.

Of one tree, ``optax.selective_transform`` updates what is not frozen and keeps no state for the
rest (of several optimizers, ``optax.partition`` with ``optax.set_to_zero()`` for ``"frozen"``):

>>> import optax
>>> tree = {"params": {"body": jnp.ones(3), "head": jnp.ones(2)}, "scales": {}}
>>> freeze_mask = jax.tree.map(lambda label: label == "frozen", labels(tree, full="head"))
>>> freeze_mask
{'params': {'body': True, 'head': False}, 'scales': {}}
>>> optimizer = optax.selective_transform(optax.sgd(1.0), freeze_mask=freeze_mask)
>>> updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
>>> updates["params"]["body"], updates["params"]["head"]
(Array([0., 0., 0.], dtype=float32), Array([-1., -1.], dtype=float32))

The gradient of a frozen weight is still computed there: only :func:`split` avoids that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hyperadapt_jax import paths
from hyperadapt_jax.plan import PlanError, check_tied, matches
from hyperadapt_jax.scales import Scales, compute_dtype


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Placeholder:
    """A node without leaves that stands in the frozen tree for a parameter that trains."""

    path: str
    dtype: Any


def split(
    params: Any, scales: Scales, full: paths.Pattern | None = None
) -> tuple[dict[str, Any], Any]:
    """Splits off what trains from what is frozen.

    Args:
      params: the model's parameters, any pytree.
      scales: the scale vectors; all of them train.
      full: which parameters train fully, such as a new classifier head: a regular expression that
        matches whole "/"-paths, or a list of path suffixes.

    Returns:
      ``trainable``, which is ``{"scales": scales, "full": {path: array}}``, and ``frozen``, which
      is ``params`` with a :class:`Placeholder` for each array of ``full``. These arrays are float32
      as the scales are, whatever the model's dtype, so that no small update is lost.

    Raises:
      PlanError: ``full`` matches nothing, or matches an array that is scaled, tied to another or
        not floating point.

    >>> import hyperadapt_jax as ha
    >>> params = {"body": jnp.ones((3, 5)), "head": jnp.ones(2, jnp.bfloat16)}
    >>> scales = ha.init(ha.plan(params, ha.Target("body", "in out")))
    >>> trainable, frozen = split(params, scales, full="head")
    >>> list(trainable["scales"]), trainable["full"]
    (['body'], {'head': Array([1., 1.], dtype=float32)})
    >>> frozen["head"]
    Placeholder(path='head', dtype=dtype(bfloat16))
    """
    chosen = _full(params, scales, full)
    wide = {path: leaf.astype(compute_dtype(leaf.dtype)) for path, leaf in chosen.items()}
    placeholders = {path: Placeholder(path, leaf.dtype) for path, leaf in chosen.items()}
    return {"scales": scales, "full": wide}, paths.replace(params, placeholders)


def combine(trainable: Mapping[str, Any], frozen: Any) -> tuple[Any, Scales]:
    """Undoes :func:`split`: returns ``(params, scales)``, each parameter in the model's dtype.

    Raises:
      ValueError: the two trees do not match: a parameter is missing from, or left over in, either.

    >>> frozen = {"head": Placeholder("head", jnp.bfloat16)}
    >>> combine({"scales": {}, "full": {"head": jnp.ones(2)}}, frozen)
    ({'head': Array([1, 1], dtype=bfloat16)}, {})
    """
    full = dict(trainable["full"])

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Placeholder):
            return leaf
        if leaf.path not in full:
            raise ValueError(
                f"{leaf.path}: is missing from the trainable tree; give the two that split returned"
            )
        return full.pop(leaf.path).astype(leaf.dtype)

    params = jax.tree.map(fill, frozen, is_leaf=lambda leaf: isinstance(leaf, Placeholder))
    if full:
        raise ValueError(
            f"{min(full)}: has no place in the frozen tree; give the two that split returned"
        )
    return params, trainable["scales"]


def labels(tree: Mapping[str, Any], full: paths.Pattern | None = None) -> dict[str, Any]:
    """Labels each leaf ``"row"``, ``"col"``, ``"full"`` or ``"frozen"``, for ``optax.partition``.

    Args:
      tree: what :func:`split` returned as ``trainable``, or ``{"params": ..., "scales": ...}``.
      full: which of ``tree["params"]`` train fully, as in :func:`split`; the others are frozen.

    Returns:
      A tree of the same structure, of strings.

    >>> import optax
    >>> from hyperadapt_jax import ScaleVectors
    >>> tree = {"scales": {"w": ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")}, "full": {}}
    >>> leaf_labels = labels(tree)
    >>> leaf_labels["scales"]["w"]
    ScaleVectors(row='row', col='col', axes='in out')
    >>> optimizer = optax.partition({"row": optax.adam(3e-3), "col": optax.adam(1e-3)}, leaf_labels)
    """
    if unknown := sorted(set(tree) - {"params", "scales", "full"}):
        raise ValueError(
            f"the tree has a key {unknown[0]!r}; give params and scales, or what split returned"
        )
    leaf_labels = {
        "scales": jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].name, tree["scales"])
    }
    if "full" in tree:
        leaf_labels["full"] = dict.fromkeys(tree["full"], "full")
    if "params" in tree:
        chosen = _full(tree["params"], tree["scales"], full)
        names, _, treedef = paths.flatten(tree["params"])
        leaf_labels["params"] = treedef.unflatten(
            ["full" if n in chosen else "frozen" for n in names]
        )
    return leaf_labels


def _full(params: Any, scales: Scales, full: paths.Pattern | None) -> dict[str, Any]:
    """The parameters that train fully, by path."""
    if full is None:
        return {}
    arrays = paths.arrays(params)
    chosen = {path: arrays[path] for path in sorted(matches(full, arrays, "full"))}
    for path, leaf in chosen.items():
        if path in scales:
            raise PlanError(f"{path}: is scaled, so it cannot also train fully; select it once")
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise PlanError(f"{path}: has dtype {leaf.dtype}, which has no gradient; leave it out")
    check_tied(chosen, arrays)
    return chosen
