"""Fine-tuning methods, one file each: what trains, and how each weight changes.

To add a method, add a file here and its entry in ``METHODS``.
"""

from hyperadapt_jax.methods.bitfit import BitFit
from hyperadapt_jax.methods.dora import DoRA
from hyperadapt_jax.methods.full import Full, Head
from hyperadapt_jax.methods.hira import HiRA
from hyperadapt_jax.methods.hyperadapt import HyperAdapt
from hyperadapt_jax.methods.hyperadapt_lora import HyperAdaptLoRA
from hyperadapt_jax.methods.ia3 import IA3
from hyperadapt_jax.methods.lora import LoRA
from hyperadapt_jax.methods.method import Method, Tuning, restore, tune
from hyperadapt_jax.methods.vera import VeRA

METHODS: dict[str, Method] = {
    "hyperadapt": HyperAdapt(),
    "row": HyperAdapt("row"),
    "col": HyperAdapt("col"),
    "hyperadapt-lora": HyperAdaptLoRA(),
    "lora": LoRA(),
    "dora": DoRA(),
    "vera": VeRA(),
    "ia3": IA3(),
    "hira": HiRA(),
    "bitfit": BitFit(),
    "full": Full(),
    "head": Head(),
}

__all__ = [
    "METHODS",
    "BitFit",
    "DoRA",
    "Full",
    "Head",
    "HiRA",
    "HyperAdapt",
    "HyperAdaptLoRA",
    "IA3",
    "LoRA",
    "Method",
    "Tuning",
    "VeRA",
    "restore",
    "tune",
]
