"""Fine-tuning methods, one file each: what trains, and how each weight changes.

To add a method, add a file here and its entry in ``METHODS``.
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
