"""What the library knows of a family of models: one `Family` for each ``model_type``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Tensor
from hyperadapt_jax.models.fields import Fields

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Family(Generic[C]):
    """How the folders of one ``model_type`` are read and written, and which module computes it.

    Attributes:
      name: the ``model_type``, which is also the ``family`` of its configurations.
      architectures: what its ``config.json`` may call a model.
      module: the model, called with a configuration, ``rngs`` and options.
      read: gives the configuration of a file's fields, and of the architectures that it names.
      write: gives the fields of a configuration.
      tensors: gives the table of a configuration: one row for each parameter.
      ignored: gives full-match patterns of the names in a checkpoint that are rightly no parameter.
      as_stored: gives a configuration as a checkpoint has it, where the file leaves that open.
      heads: a pattern of the names in a checkpoint that a head has, by the end of its architecture:
        of those heads that the module may lack.
    """

    name: str
    architectures: tuple[str, ...]
    module: Callable[..., Any]
    read: Callable[[Fields, Sequence[str]], C]
    write: Callable[[C], dict[str, Any]]
    tensors: Callable[[C], tuple[Tensor, ...]]
    ignored: Callable[[C], tuple[str, ...]]
    as_stored: Callable[[C, Checkpoint], C]
    heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
