"""Tables that map a checkpoint's tensors to a model's parameters, and the reading and writing of both."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its place among a model's parameters.

    Attributes:
      name: name in the checkpoint, with ``{layer}`` where it stands once per layer, as
        ``model.layers.{layer}.self_attn.q_proj.weight``.
      path: "/"-joined path of the parameter, as ``layers/q/kernel``; a name with ``{layer}``
        fills the parameter's leading axis, one slice per layer.
      transpose: the checkpoint stores ``(out, in)`` where the parameter is ``(in, out)``.
      optional: the tensor may be missing, and the parameter is then newly initialised and
        reported (heads, poolers).
      aliases: other names of the same tensor, with a prefix more or less.
    """

    name: str
    path: str
    transpose: bool = False
    optional: bool = False
    aliases: tuple[str, ...] = ()
