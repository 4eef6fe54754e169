"""The rule of every primitive that lets a scaled weight pass.

A rule gets the equation and its operands, of which at least one is a ``Scaled``, and returns the
results; or it returns None where no factor can pass, and then the weight is materialized.
"""

from __future__ import annotations

from jax.extend.core import JaxprEqn

from hyperadapt_jax.interpreter import codes, contractions, control_flow, jax_versions, layout
from hyperadapt_jax.interpreter.interpreter import Interpreter, Rule
from hyperadapt_jax.interpreter.values import Operands, Results, Scaled

RULES: dict[str, Rule] = {
    "dot_general": contractions.dot_general,
    "ragged_dot_general": contractions.ragged_dot_general,
    "conv_general_dilated": contractions.conv_general_dilated,
    "gather": contractions.gather,
    "mul": codes.mul,
    "split": layout.split,
    "concatenate": layout.concatenate,
    "stack": layout.concatenate,
    "pad": layout.pad,
    "select_n": layout.select_n,
    "scatter": layout.overwrite,
    "dynamic_update_slice": layout.overwrite,
    "optimization_barrier": layout.each,
    "device_put": layout.each,
    **dict.fromkeys(
        ["convert_element_type", "copy", "reduce_precision", "pvary", "name"]
        + ["sharding_constraint"],
        layout.keep,
    ),
    "neg": layout.neg,
    "div": codes.div,
    **dict.fromkeys(["add", "sub", "add_any"], codes.affine),
    "stop_gradient": layout.stop_gradient,
    "reshard": layout.reshard,
    "transpose": layout.transpose,
    "squeeze": layout.squeeze,
    "broadcast_in_dim": layout.broadcast_in_dim,
    "reshape": layout.reshape,
    "slice": layout.slice_,
    "dynamic_slice": layout.dynamic_slice,
    "rev": layout.rev,
    "reduce_sum": layout.reduce_sum,
    "ppermute": layout.ppermute,
    "all_gather": layout.all_gather,
    "all_gather_invariant": layout.all_gather,
    "jit": control_flow.jit,
    "remat2": control_flow.remat,
    "cond": control_flow.cond,
    "scan": control_flow.scan,
    "while": control_flow.while_loop,
    "shard_map": control_flow.shard_map,
}


def apply(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Runs an equation of which some operands are Scaled by its rule; None if there is none."""
    results = None
    if any(isinstance(x, Scaled) and x.codes for x in operands):
        results = codes.decode(interpreter, eqn, operands)
    rule = RULES.get(jax_versions.name_of(eqn))
    return rule(interpreter, eqn, operands) if results is None and rule else results
