"""The families of encoders of the BERT shape: what sets each apart from the others."""

from __future__ import annotations

import functools

from hyperadapt_jax.models.encoder.config import Dialect, read, write
from hyperadapt_jax.models.encoder.model import Encoder
from hyperadapt_jax.models.encoder.tensors import HEADS, as_stored, ignored, tensors
from hyperadapt_jax.models.family import Family


def _family(dialect: Dialect, prefix: str) -> Family:
    return Family(
        name=dialect.family,
        architectures=tuple(dialect.architecture + head for head in ("Model", *HEADS)),
        module=Encoder,
        read=functools.partial(read, dialect),
        write=functools.partial(write, dialect),
        tensors=functools.partial(tensors, prefix=prefix),
        ignored=ignored,
        as_stored=functools.partial(as_stored, prefix=prefix),
        heads=HEADS,
    )


def _roberta(family: str, architecture: str) -> Family:
    dialect = Dialect(family, architecture, pad_token=1, counts_padding=False, head="tanh")
    return _family(dialect, "roberta.")


BERT = _family(Dialect("bert", "Bert", pad_token=0, counts_padding=True, head="pooled"), "bert.")
ROBERTA = _roberta("roberta", "Roberta")
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRoberta")
CAMEMBERT = _roberta("camembert", "Camembert")
