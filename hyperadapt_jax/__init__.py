"""HyperAdapt in JAX: fine-tune a frozen weight ``W`` as ``diag(1 + row) W diag(1 + col)``."""
