"""Recipes that fine-tune, watch, resume, evaluate and export: ``python -m train --help``.

An installed package has them as ``hyperadapt_jax.train``, and as the command ``hyperadapt``.
"""

# How this program is called: from a checkout, or as it is installed.
PROGRAM = "python -m train" if __package__ == "train" else "hyperadapt"
