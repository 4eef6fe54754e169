"""Which weights are adapted: the targets, the plan made from them, and the initial vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import paths
from hyperadapt_jax.scales import (
    ARRAYS,
    ROLES,
    SIDES,
    Scales,
    ScaleVectors,
    side_axes,
    side_shape,
    stack_axes,
)
from hyperadapt_jax.sharding import check_axes, vector_sharding
from hyperadapt_jax.tables import table


class PlanError(ValueError):
    """A selection of weights that is ambiguous, empty or cannot be adapted."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Weights to adapt, and what their axes mean.

    Attributes:
      pattern: a regular expression that matches whole "/"-paths, or a list of path suffixes
        (``["q/kernel", "v/kernel"]``).
      axes: one role per axis of the weight, in order: ``in`` (input features, scaled by ``col``),
        ``out`` (output features, scaled by ``row``), ``stack`` (layers or experts, each with
        separate vectors) or ``-`` (unscaled). ``"in out"`` is a Dense kernel, ``"out in"`` an
        Equinox one, ``"stack in out"`` a scanned one, ``"in out out"`` a query projection
        (D, N, H), ``"- - in out"`` a convolution. Without ``in`` there is no ``col``, without
        ``out`` no ``row``: ``"- out"`` is (IA)^3.
      quantized: the weight holds integer codes which the model's function dequantizes itself. What
        is scaled is the dequantized weight: a zero point and a step, which must be among the
        parameters or constants, a code book, shifts and masks may all come first. Vectors have the
        shape of the codes: where one code packs several values, they share its scale.

    Raises:
      PlanError: an unknown role, no ``in`` and no ``out``, or a pattern that is no regex.
    """

    pattern: paths.Pattern
    axes: str
    quantized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        roles = self.axes.split()
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise PlanError(
                f"unknown axis role {unknown[0]!r} in {self.axes!r}; use {', '.join(ROLES)}"
            )
        if not {"in", "out"} & set(roles):
            raise PlanError(
                f"the roles {self.axes!r} have no 'in' and no 'out' axis: nothing would be scaled"
            )
        try:
            paths.matcher(self.pattern)
        except ValueError as error:
            raise PlanError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """One adapted weight in a plan: its place, its shape and what its axes mean.

    Attributes:
      path, shape, dtype: the weight's.
      axes: its roles, as in :class:`Target`.
      sharding: its own, or None.
      replicate: mesh axes along which the arrays that adapt it are kept whole.
      sides: which scale vectors it has, of those that its roles call for.
      rank: of a low-rank term; None for none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: str
    sharding: jax.sharding.NamedSharding | None = None
    replicate: tuple[str, ...] = ()
    sides: tuple[str, ...] = tuple(SIDES)
    rank: int | None = None

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that adapt it, by name: row, col, down, up."""
        names = (*self.sides, "down", "up")
        shapes = {name: side_shape(self.shape, self.axes, name, self.rank) for name in names}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding | None]:
        """The shardings of its arrays, from the weight's; None where it has none."""
        if self.sharding is None:
            return dict.fromkeys(self.arrays)
        axes = {name: side_axes(self.axes, name) for name in self.arrays}
        return {n: vector_sharding(self.sharding, a, self.replicate) for n, a in axes.items()}

    @property
    def count(self) -> int:
        """The number of parameters in the arrays that adapt it."""
        return sum(math.prod(shape) for shape in self.arrays.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The weights that an adapter scales; it prints as a table.

    Attributes:
      weights: the adapted weights, in the tree's order.
      total: the number of parameters in the whole tree.
    """

    weights: tuple[PlannedWeight, ...]
    total: int

    @property
    def count(self) -> int:
        """The number of trainable parameters."""
        return sum(weight.count for weight in self.weights)

    def restrict(self, sides: Literal["both", "row", "col"]) -> Plan:
        """Returns the plan with only one side of each weight scaled.

        Raises:
          PlanError: ``sides`` is none of the three, or a weight has no such side.
        """
        if sides not in ("both", *SIDES):
            raise PlanError(f'sides must be "both", "row" or "col", not {sides!r}')
        drop = {"both": None, "row": "in", "col": "out"}[sides]
        weights = []
        for weight in self.weights:
            axes = " ".join("-" if role == drop else role for role in weight.axes.split())
            if not {"in", "out"} & set(axes.split()):
                raise PlanError(
                    f"{weight.path}: the roles {weight.axes!r} leave nothing to scale with"
                    f" sides={sides!r}; exclude it"
                )
            weights.append(dataclasses.replace(weight, axes=axes))
        return dataclasses.replace(self, weights=tuple(weights))

    def with_low_rank(self, rank: int, sides: Sequence[str] = ()) -> Plan:
        """Returns the plan with a low-rank term for each weight.

        Args:
          rank: r.
          sides: which scale vectors each weight keeps, of ``"row"`` and ``"col"``; none if empty.

        Raises:
          PlanError: the rank is not positive.

        >>> import hyperadapt_jax as ha
        >>> low_rank = ha.plan({"w": jnp.ones((3, 5))}, ("w", "in out")).with_low_rank(2)
        >>> low_rank.weights[0].arrays, low_rank.count
        ({'down': (3, 2), 'up': (5, 2)}, 16)
        """
        check_rank(rank)
        changed = [
            dataclasses.replace(w, rank=rank, sides=tuple(s for s in w.sides if s in sides))
            for w in self.weights
        ]
        return dataclasses.replace(self, weights=tuple(changed))

    def __str__(self) -> str:
        sharded = any(weight.sharding is not None for weight in self.weights)
        names = [n for n in ARRAYS if any(n in weight.arrays for weight in self.weights)]
        header = ["weight", "shape", "dtype", "roles", *names, "parameters"]
        rows = [
            [w.path, _shape(w.shape), jnp.dtype(w.dtype).name, w.axes]
            + [_shape(w.arrays.get(name)) for name in names]
            + [f"{w.count:,}"]
            for w in self.weights
        ]
        if sharded:
            header += [f"{name} spec" for name in names]
            for row, weight in zip(rows, self.weights, strict=True):
                row += [_spec(weight.shardings.get(name)) for name in names]
        return (
            f"{table(header, rows, right='parameters')}\n"
            f"{len(self.weights)} weights, {self.count:,} trainable parameters, "
            f"{self.count / max(self.total, 1):.3%} of the model's {self.total:,}; "
            f"{_bytes(4 * self.count)} in float32, {_bytes(12 * self.count)} with Adam's state"
        )


def plan(
    params: Any,
    *targets: Target | tuple[paths.Pattern, str],
    exclude: paths.Pattern | None = None,
    sides: Literal["both", "row", "col"] = "both",
    replicate: Sequence[str] = (),
) -> Plan:
    """Chooses the weights to adapt: a dry run that allocates nothing.

    Args:
      params: the frozen parameters, any pytree of arrays or ``jax.ShapeDtypeStruct``.
      *targets: which weights, with their axis roles; ``(pattern, axes)`` pairs are accepted.
      exclude: a regular expression, or suffixes, of paths to leave out.
      sides: ``"row"`` or ``"col"`` trains that one side of every target alone.
      replicate: mesh axes along which the vectors of sharded weights are kept whole: those that
        shard the batch, under FSDP (see :mod:`hyperadapt_jax.sharding`).

    Returns:
      A :class:`Plan`, for :func:`hyperadapt_jax.init`. ``print`` it before training.

    Raises:
      PlanError: no target given; a target or ``exclude`` that matches nothing; a weight matched by
        two targets; roles that do not fit the number of axes; a weight that is integer (and not
        declared quantized), is empty, or is tied to another. Each names the path and, where
        nothing matched, the nearest ones.
      ValueError: ``replicate`` names an axis that a sharded weight's mesh does not have.

    >>> import hyperadapt_jax as ha
    >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    >>> ha.plan(params, ha.Target(".*/kernel", "in out")).count
    8
    """
    if not targets:
        raise PlanError("no targets; give at least one: which weights, and the roles of their axes")
    given = [target if isinstance(target, Target) else Target(*target) for target in targets]
    arrays = paths.arrays(params)
    excluded = matches(exclude, arrays, "exclude") if exclude else set()

    chosen: dict[str, Target] = {}
    for target in given:
        matched = matches(target.pattern, arrays, "the target")
        if matched <= excluded:
            raise PlanError(
                f"the target {target.pattern!r} matches nothing that {exclude!r} does not exclude"
            )
        for path in sorted(matched - excluded):
            if path in chosen:
                raise PlanError(
                    f"{path}: matched by two targets, {chosen[path].pattern!r} and"
                    f" {target.pattern!r}; narrow one of them"
                )
            chosen[path] = target
            _check(path, arrays[path], target)
    check_tied(chosen, arrays)

    weights = []
    for path in (name for name in arrays if name in chosen):
        leaf = arrays[path]
        if (sharding := paths.named_sharding(leaf)) is not None:
            check_axes(sharding.mesh, replicate)
        shape, whole = tuple(leaf.shape), tuple(replicate)
        weights.append(PlannedWeight(path, shape, leaf.dtype, chosen[path].axes, sharding, whole))
    total = sum(int(np.prod(leaf.shape)) for leaf in arrays.values())
    return Plan(tuple(weights), total).restrict(sides)


def init(plan: Plan, key: jax.Array | None = None) -> Scales:
    """Returns initial arrays for a plan, with which the adapted model equals the base.

    Scale vectors and ``up`` are zero; ``down`` is uniform within ``1 / sqrt(inputs)``, as LoRA's
    authors and PEFT draw it (Kaiming's, with a slope of ``sqrt(5)``).

    Args:
      plan: what :func:`plan` returned.
      key: to draw ``down`` with; for a plan with low-rank terms.

    Returns:
      ``{path: ScaleVectors}`` in float32, whatever the dtype of the base; where a weight carries a
      ``NamedSharding``, its arrays carry the part of it that belongs to their axes.

    Raises:
      PlanError: the plan has low-rank terms, and there is no key.

    >>> import hyperadapt_jax as ha
    >>> params = {"dense": {"kernel": jnp.ones((3, 5), jnp.bfloat16)}}
    >>> scales = ha.init(ha.plan(params, ha.Target("dense/kernel", "in out")))
    >>> scales["dense/kernel"].row.shape, scales["dense/kernel"].col.shape
    ((5,), (3,))
    """
    scales = {}
    for i, w in enumerate(plan.weights):
        places = w.shardings
        arrays: dict[str, Any] = dict.fromkeys(SIDES)
        for name, shape in w.arrays.items():
            if name == "down":
                if key is None:
                    raise PlanError("key: is needed to draw the low-rank terms of this plan with")
                slices = math.prod(w.shape[axis] for axis in stack_axes(w.axes))
                inputs = math.prod(shape[:-1]) // slices
                limit = 1 / math.sqrt(inputs)
                own = jax.random.fold_in(key, i)
                drawn = jax.random.uniform(own, shape, jnp.float32, -limit, limit)
                arrays[name] = jax.device_put(drawn, places[name]) if places[name] else drawn
            else:
                arrays[name] = jnp.zeros(shape, jnp.float32, device=places[name])
        scales[w.path] = ScaleVectors(axes=w.axes, **arrays)
    return scales


def matches(pattern: paths.Pattern, arrays: dict[str, Any], what: str) -> set[str]:
    """The paths a pattern matches; an error where it, or one suffix of a list, matches none."""
    for part in [pattern] if isinstance(pattern, str) else [[suffix] for suffix in pattern]:
        if not any(map(paths.matcher(part), arrays)):
            shown = part if isinstance(part, str) else part[0]
            raise PlanError(
                f"{what} {shown!r} matches none of the {len(arrays)} arrays;"
                f" {paths.suggest(part, arrays)}"
            )
    return set(filter(paths.matcher(pattern), arrays))


def _check(path: str, leaf: Any, target: Target) -> None:
    roles = target.axes.split()
    if len(leaf.shape) != len(roles):
        raise PlanError(
            f"{path}: has {len(leaf.shape)} axes, shape {_shape(leaf.shape)}, but the target"
            f" {target.pattern!r} gives roles for {len(roles)}: {target.axes!r}"
        )
    if 0 in leaf.shape:
        raise PlanError(f"{path}: is empty, shape {_shape(leaf.shape)}; exclude it")
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) and not target.quantized:
        raise PlanError(
            f"{path}: has dtype {leaf.dtype}, which cannot be scaled; if these are codes that the"
            " function dequantizes itself, pass Target(..., quantized=True)"
        )


def check_rank(rank: int) -> None:
    """Raises PlanError where a rank is not positive."""
    if rank < 1:
        raise PlanError(f"rank: is {rank}; give at least 1")


def check_tied(chosen: dict[str, Target], arrays: dict[str, Any]) -> None:
    """Raises PlanError for a chosen leaf that is also another leaf: scaling would untie them."""
    owner: dict[int, str] = {}
    for path, leaf in arrays.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        other = owner.setdefault(id(leaf), path)
        if other != path and (path in chosen or other in chosen):
            raise PlanError(
                f"{path}: is tied to {other}, one array in two places; keep it in one place of the"
                " tree, or copy it to adapt the two separately"
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _spec(sharding: jax.sharding.NamedSharding | None) -> str:
    return "-" if sharding is None else str(sharding.spec)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
