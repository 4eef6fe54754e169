"""DoRA (arXiv 2402.09353): ``diag(m / norm(W + up down)) (W + up down)``.

The norm is that of each output's weights, and has no gradient (section 4.3 of the paper). It takes
no array of the weight's size: ``|w + u|^2 = |w|^2 + 2 w u + |u|^2``, of which the last two are
products with the factors of the low-rank term.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hyperadapt_jax import paths
from hyperadapt_jax.methods.lora import LoRA
from hyperadapt_jax.plan import Plan, PlanError
from hyperadapt_jax.scales import Scales, ScaleVectors, side_axes


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """A low-rank term of each weight, and the magnitude of each of its outputs.

    ``row`` trains as the difference from the norm of the frozen weight's output: zero at the start.
    """

    @property
    def summary(self) -> str:
        return "a low-rank term of each weight and its outputs' magnitudes"

    def select(self, plan: Plan) -> Plan:
        for weight in plan.weights:
            if "out" not in weight.axes.split():
                raise PlanError(
                    f"{weight.path}: the roles {weight.axes!r} name no 'out' axis, whose magnitudes"
                    " DoRA trains; exclude it"
                )
        return plan.with_low_rank(self.rank, ["row"])

    def scales(self, trained: Any, params: Any) -> Scales:
        weights, found = paths.arrays(params), {}
        for path, vectors in super().scales(trained, params).items():
            base, adapted = jax.lax.stop_gradient(_norms(weights[path], vectors))
            row = (base + vectors.row) / adapted - 1
            found[path] = dataclasses.replace(vectors, row=row)
        return found


def _norms(weight: jax.Array, vectors: ScaleVectors) -> tuple[jax.Array, jax.Array]:
    """The norm of each output of a weight, without and with its low-rank term, as row is shaped."""
    axes, ranks = range(weight.ndim), (weight.ndim, weight.ndim + 1)
    out, down, up = (side_axes(vectors.axes, name) for name in ("row", "down", "up"))

    def product(*operands: Any) -> jax.Array:
        return jnp.einsum(*operands, list(out), preferred_element_type=jnp.float32)

    base = product(weight, [*axes], weight, [*axes])
    seen = jnp.einsum(
        weight, [*axes], vectors.down, [*down, ranks[0]], [*up, ranks[0]],
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    mixed = product(seen, [*up, ranks[0]], vectors.up, [*up, ranks[0]])
    stack = [axis for axis in down if axis in up]
    gram = jnp.einsum(
        vectors.down, [*down, ranks[0]], vectors.down, [*down, ranks[1]], [*stack, *ranks]
    )
    term = product(gram, [*stack, *ranks], vectors.up, [*up, ranks[0]], vectors.up, [*up, ranks[1]])
    return jnp.sqrt(base), jnp.sqrt(jnp.maximum(base + 2 * mixed + term, 1e-30))
