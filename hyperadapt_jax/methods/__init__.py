"""Ways to fine-tune: what trains, and what becomes of each weight; one file each.

Another method is another file here, and its line in ``METHODS``.
"""

from hyperadapt_jax.methods.bitfit import BitFit
from hyperadapt_jax.methods.full import Full, Head
from hyperadapt_jax.methods.hyperadapt import HyperAdapt
from hyperadapt_jax.methods.method import Method, Tuning, tune

METHODS: dict[str, Method] = {
    "hyperadapt": HyperAdapt(),
    "row": HyperAdapt("row"),
    "col": HyperAdapt("col"),
    "bitfit": BitFit(),
    "full": Full(),
    "head": Head(),
}

__all__ = ["METHODS", "BitFit", "Full", "Head", "HyperAdapt", "Method", "Tuning", "tune"]
