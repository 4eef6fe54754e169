"""A run's training step, compiled ahead of time for devices that need not exist.

The step is the very one that a run takes, on arrays that are shapes alone, compiled by XLA for CPU
devices. In float32 it is the program that a run on such devices has. For bfloat16, which XLA for
CPU computes in float32, with copies of the weights in it, float16 stands in: it has the same size
and is computed as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from .. import base, methods
from ..errors import InputError, first_line
from ..options import AdapterOptions, ModelOptions, OptimizerOptions
from ..parallel import program
from ..parallel.fake import fake_devices
from ..parallel.mesh import AXES, Layout, activations_of, make_mesh, parse_rules
from . import losses
from .optimizer import learning_rates, make_optimizer
from .step import Loss, State, describe, make_step

STEPS = 1000  # of the schedules, whose length no array depends on

# With these, XLA for CPU makes float32 of a product's operands where it cannot compute it as it is.
# An accelerator can, and here nothing runs.
_FLAGS = "--xla_disable_hlo_passes=change-op-data-type,operand_upcaster"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """All that a compiled step depends on.

    Attributes:
      model: a folder with a config.json.
      adapter: what trains.
      labels: outputs of an encoder's new head; None for a decoder.
      optimizer: adamw or muon.
      shape: sizes of the mesh's axes `AXES`.
      rules: as `parse_rules` takes them.
      batch_size: rows of a step.
      max_length: tokens of a row.
      accumulate: parts that a batch is computed in.
      loss_chunk: tokens whose logits exist at once.
    """

    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    labels: int | None = None
    optimizer: Any = "adamw"
    shape: tuple[int, int, int] = (1, 1, 1)
    rules: tuple[str, ...] = ()
    batch_size: int = 32
    max_length: int = 512
    accumulate: int = 1
    loss_chunk: int | None = None

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return int(np.prod(self.shape))

    @property
    def mesh(self) -> str:
        """The mesh's axes that are not 1, as ``--mesh`` takes them."""
        pairs = zip(AXES, self.shape, strict=True)
        return ",".join(f"{name}={size}" for name, size in pairs if size > 1) or "data=1"


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What a step takes and does on each device.

    Attributes:
      options: of which step.
      rows: of its batch, filled up so that the mesh divides them.
      frozen: bytes of the frozen weights.
      trainable: bytes of what trains.
      optimizer: bytes of the optimizer's state, and of the step's number and key.
      batch: bytes of the batch.
      memory: of the whole program, by XLA's analysis.
      work: products and collectives.
      notes: lines on what the mesh does not divide.
      seconds: that it took to trace and compile.
      peak: the most bytes that the process that compiled it held.
      topology: the TPUs whose compiler tells ``memory``; None for XLA for CPU.
    """

    options: StepOptions
    rows: int
    frozen: int
    trainable: int
    optimizer: int
    batch: int
    memory: program.Memory
    work: program.Work
    notes: tuple[str, ...]
    seconds: float
    peak: int
    topology: str | None = None

    @property
    def held(self) -> int:
        """Bytes that are held between the steps."""
        return self.frozen + self.trainable + self.optimizer

    @property
    def working(self) -> int:
        """Bytes of activations, gradients and all else that a step holds besides its arguments."""
        return self.memory.returned + self.memory.temporary

    @property
    def total(self) -> int:
        """Bytes that a step takes."""
        return self.memory.total


def planning(devices: int, dtype: str) -> contextlib.AbstractContextManager[Callable[..., Any]]:
    """A process of its own with so many fake devices, as `train.parallel.fake.fake_devices`.

    Args:
      devices: at least as many as any mesh has.
      dtype: of the computation.
    """
    return fake_devices(devices, _FLAGS if dtype == "bfloat16" else "")


def compile_step(options: StepOptions) -> StepFacts:
    """Compiles a step for the first of the devices that there are.

    Raises:
      InputError: an axis of the mesh divides nothing of the model, or nothing trains.
    """
    began = time.monotonic()
    layout, wanted = None, options
    if options.devices > 1:
        layout = Layout(make_mesh(options.shape), parse_rules(options.rules))
    if options.model.dtype == "bfloat16":
        stand_in: Any = "float16"
        wanted = dataclasses.replace(
            options, model=dataclasses.replace(options.model, dtype=stand_in)
        )
    step = _Described.of(wanted, layout)
    compiled = step.compiled()
    return StepFacts(
        options=options,
        rows=step.rows,
        frozen=_bytes(step.tuning.frozen),
        trainable=_bytes(step.state.trainable),
        optimizer=_bytes(step.state) - _bytes(step.state.trainable),
        batch=_bytes(step.batch),
        memory=_memory(compiled),
        work=program.work(compiled.as_text()),
        notes=() if layout is None else tuple(layout.notes(step.base.config)[1:]),
        seconds=time.monotonic() - began,
        peak=_peak(),
    )


def held_bytes(options: StepOptions) -> int:
    """What a device holds between the steps; nothing is compiled. Errors: `compile_step`'s."""
    layout = Layout(make_mesh(options.shape), parse_rules(options.rules))
    step = _Described.of(options, layout)
    return _bytes(step.tuning.frozen) + _bytes(step.state)


def tpu_memory(options: StepOptions, topology: str) -> program.Memory:
    """What a step takes on TPUs that need not exist, by their own compiler.

    Args:
      options: of the step.
      topology: a slice, such as ``v5e:16x16``.

    Raises:
      InputError: libtpu is not installed or knows no such slice, or it has fewer devices; or as
        `compile_step`.
    """
    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # the library's own, in many kinds
        raise InputError(
            f"--topology {topology}: {first_line(error)} It needs libtpu, which pip install"
            " 'jax[tpu]' brings, and a slice such as v5e:4x4"
        ) from error
    if len(devices) < options.devices:
        raise InputError(
            f"--topology {topology}: has {len(devices)} devices, and --mesh takes {options.devices}"
        )
    some = np.array(devices[: options.devices], object)
    mesh = Mesh(some.reshape(options.shape), AXES, axis_types=(AxisType.Auto,) * 3)
    return _memory(_Described.of(options, Layout(mesh, parse_rules(options.rules))).compiled())


@dataclasses.dataclass(frozen=True, eq=False)
class _Described:
    """A step of shapes alone.

    Attributes:
      options: of the step.
      base: the model.
      tuning: what trains.
      optimizer: of what trains.
      state: before a step.
      rows: of the batch, filled up so that the mesh divides them.
      batch: of so many rows.
    """

    options: StepOptions
    base: base.Base
    tuning: Tuning
    optimizer: Any
    state: State
    rows: int
    batch: dict[str, Any]

    @classmethod
    def of(cls, options: StepOptions, layout: Layout | None) -> _Described:
        described = base.load_abstract(options.model, options.labels, layout)
        config, tuning = described.config, methods.tune(described, options.adapter)
        optimizer = make_optimizer(_optimizer(options), tuning, STEPS, models.matrices(config))
        where = activations_of(tuning.fn)
        rows = where.filled(options.batch_size // options.accumulate) * options.accumulate
        batch = _batch(config, rows, options.max_length)
        if where.mesh is not None:
            divided = NamedSharding(where.mesh, PartitionSpec(where.rows))
            batch = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=divided)
                for name, x in batch.items()
            }
        state = describe(tuning, optimizer)
        return cls(options, described, tuning, optimizer, state, rows, batch)

    def compiled(self) -> Any:
        """The step's program."""
        step: Any = make_step(
            _loss(self.tuning, self.base.config, self.options.loss_chunk),
            self.optimizer,
            learning_rates(_optimizer(self.options), self.tuning, STEPS),
            accumulate=self.options.accumulate,
            activations=activations_of(self.tuning.fn),
            state=self.state,
        )
        return step.lower(self.state, self.tuning.frozen, self.batch).compile()


def _optimizer(options: StepOptions) -> OptimizerOptions:
    return OptimizerOptions(optimizer=options.optimizer)


def _memory(compiled: Any) -> program.Memory:
    if (found := program.memory(compiled)) is None:
        raise InputError("this version of XLA does not tell what a program takes")
    return found


def _loss(tuning: Tuning, config: models.Config, chunk: int | None) -> Loss:
    if isinstance(config, models.EncoderConfig):
        return losses.classification(tuning, dropout=True)
    return losses.next_token(tuning, chunk)


def _batch(config: models.Config, rows: int, length: int) -> dict[str, Any]:
    """The shapes of a batch, as `train.data.batches.Batches` makes it of unpacked rows."""
    of_tokens = {"tokens": jnp.int32, "mask": jnp.bool_}
    of_rows: dict[str, Any] = {"weight": jnp.float32}
    if not isinstance(config, models.EncoderConfig):
        of_tokens["labels"] = jnp.int32
    else:
        of_rows["label"] = jnp.float32 if config.num_labels == 1 else jnp.int32
    made = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in of_tokens.items()}
    return made | {name: jax.ShapeDtypeStruct((rows,), kind) for name, kind in of_rows.items()}


def _bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on each device."""
    return sum(
        int(np.prod(shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        for shape in [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape]
    )


def _peak() -> int:
    """The most bytes that this process held."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found
