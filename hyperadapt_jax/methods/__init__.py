"""Ways to fine-tune: what trains, and what becomes of each weight; one file each.

Another method is another file here, and its line in ``METHODS``.
"""

from hyperadapt_jax.methods.full import Full, Head
from hyperadapt_jax.methods.hyperadapt import HyperAdapt
from hyperadapt_jax.methods.method import Method, Tuning, tune

METHODS: dict[str, Method] = {
    "hyperadapt": HyperAdapt(),
    "row": HyperAdapt("row"),
    "col": HyperAdapt("col"),
    "full": Full(),
    "head": Head(),
}

__all__ = ["METHODS", "Full", "Head", "HyperAdapt", "Method", "Tuning", "tune"]
