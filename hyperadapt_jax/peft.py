"""Adapters as Hugging Face PEFT's files, both ways.

What adapts a weight here is one of PEFT's adapters, exactly:

* Scale vectors are a HiRA adapter of rank 2. HiRA's weight is ``W + W * (B A)``, entry by entry,
  and ``B A = (1 + row) col^T + row 1^T`` is ``(1 + row)(1 + col)^T - 1``. In this order of factors
  no small delta is lost by cancellation.
* A low-rank term is a LoRA adapter whose alpha is its rank, since ``up`` holds the scaling.
* With ``row``, it is a DoRA adapter, whose magnitude is ``(1 + row) norm(W + up down)``.

A bias stays as it is in all of them. What trained fully is one of ``modules_to_save``.

PEFT calls weights by the names of the checkpoint's modules: a table says which parameter each
tensor of the checkpoint is, `hyperadapt_jax.models.tensors(config)` for the models here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from hyperadapt_jax import paths
from hyperadapt_jax.adapter import (
    CONFIG,
    TENSORS,
    Adapter,
    AdapterError,
    on_host,
    read_folder,
    refusing,
    write_folder,
)
from hyperadapt_jax.scales import SIDES, ScaleVectors, side_axes

PREFIX = "base_model.model."
TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
_HEADS = ("classifier", "score")  # modules that PEFT saves with every sequence classifier
_LAYER = "{layer}"


class Row(Protocol):
    """A tensor of the checkpoint, and the parameter that it is; `models.Tensor` is one."""

    @property
    def name(self) -> str:
        """With ``{layer}`` where the parameter stacks one tensor of each layer on axis 0."""

    @property
    def path(self) -> str:
        """Of the parameter."""

    @property
    def transpose(self) -> bool:
        """The checkpoint holds (outputs, inputs) and the parameter (inputs, outputs)."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of the checkpoint: a parameter, or one layer of it."""

    name: str
    path: str
    layer: int | None
    transpose: bool

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def of(self, array: np.ndarray) -> np.ndarray:
        """Its part of the parameter, as the checkpoint holds it."""
        part = array if self.layer is None else array[self.layer]
        return part.T if self.transpose else part


def places(rows: Iterable[Row], shapes: Mapping[str, Sequence[int]]) -> Iterator[Place]:
    for row in rows:
        if row.path not in shapes:
            continue
        stacked = _LAYER in row.name
        for layer in range(shapes[row.path][0]) if stacked else [None]:
            name = row.name.replace(_LAYER, str(layer))
            yield Place(name, row.path, layer, row.transpose)


# Writing


def save(
    folder: str | os.PathLike,
    adapter: Adapter,
    params: Any,
    tensors: Iterable[Row],
    *,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Writes an adapter as a folder that ``peft.PeftModel.from_pretrained`` loads, atomically.

    A HyperAdapt adapter needs peft 0.21 or newer: earlier versions lose small scales when they
    merge into bfloat16.

    Args:
      folder: the folder to create; an empty one is accepted.
      adapter: the adapter.
      params: the base parameters. Of an adapter with a low-rank term and ``row``, the values of the
        weights are read; else ``jax.ShapeDtypeStruct`` will do.
      tensors: the table of the checkpoint's tensors, ``models.tensors(config)``.
      task_type: PEFT's name for the model's class, one of ``"CAUSAL_LM"``, ``"SEQ_CLS"`` and
        ``"FEATURE_EXTRACTION"``.

    Raises:
      AdapterError: what PEFT has no adapter for; it says what, and what to do. The adapter does not
        fit the parameters. A folder with files.

    >>> import tempfile
    >>> from hyperadapt_jax.models import Tensor
    >>> params = {"up": {"kernel": jnp.ones((3, 5))}}
    >>> vectors = ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")
    >>> adapter = Adapter({"up/kernel": vectors}, base_model="org/model")
    >>> table = [Tensor("up_proj.weight", "up/kernel", transpose=True)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, adapter, params, table)
    ...     load(folder, params, table).scales["up/kernel"].row
    Array([0., 0., 0., 0., 0.], dtype=float32)
    """
    if task_type not in TASKS:
        raise AdapterError(f"task_type: is {task_type!r}; give one of {', '.join(TASKS)}")
    adapter.check(params)
    arrays = paths.arrays(params)
    known = list(places(tensors, {path: leaf.shape for path, leaf in arrays.items()}))
    low_rank = [path for path, vectors in adapter.scales.items() if vectors.down is not None]
    if not adapter.scales:
        raise AdapterError(
            "the adapter adapts no weight: PEFT has no adapter of fully trained parameters alone;"
            " merge it into the base instead"
        )
    if low_rank and (other := sorted(adapter.scales.keys() - low_rank)):
        raise AdapterError(
            f"{other[0]}: has scale vectors alone, and {low_rank[0]} has a low-rank term: PEFT has"
            " no adapter of both kinds; merge it into the base instead"
        )
    files: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {
        "base_model_name_or_path": adapter.base_model,
        "task_type": task_type,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    targets = [place for place in known if place.path in adapter.scales]
    if missing := sorted(adapter.scales.keys() - {place.path for place in targets}):
        raise AdapterError(f"{missing[0]}: is none of the checkpoint's tensors that are given")
    of = [_Matrix.of(place, adapter.scales[place.path]) for place in targets]
    if low_rank:
        dora = any(matrix.row is not None for matrix in of)
        config |= _lora(of, files, arrays if dora else None)
    else:
        config |= {"peft_type": "HIRA", "r": 2, "hira_dropout": 0.0, "init_weights": True}
        config |= {"rank_pattern": {}}
        for matrix in of:
            a, b = _hira(matrix, arrays[matrix.place.path].shape)
            files[f"{PREFIX}{matrix.place.module}.hira_A"] = a
            files[f"{PREFIX}{matrix.place.module}.hira_B"] = b
    config["target_modules"] = [place.module for place in targets]
    config["modules_to_save"] = _modules(adapter, known, files, task_type)
    data = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in files.items()})
    write_folder(folder, {TENSORS: data, CONFIG: (json.dumps(config, indent=2) + "\n").encode()})


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """What adapts one matrix of the checkpoint, (outputs x inputs), float32.

    Attributes:
      place: which one.
      row: outputs, or None.
      col: inputs, or None.
      down: [inputs, r], or None.
      up: [outputs, r], or None.
    """

    place: Place
    row: np.ndarray | None
    col: np.ndarray | None
    down: np.ndarray | None
    up: np.ndarray | None

    @classmethod
    def of(cls, place: Place, vectors: ScaleVectors) -> _Matrix:
        """The part of a weight's arrays that belongs to one matrix, by the axes that they span."""
        stacked = place.layer is not None
        if not place.transpose or len(vectors.axes.split()) != 2 + stacked:
            raise AdapterError(
                f"{place.path}: is no matrix of a linear layer, for which alone this writes PEFT's"
                " adapters; merge it into the base instead"
            )
        found: dict[str, np.ndarray] = {}
        inputs = 0 + stacked  # the axis of the parameter; outputs are the next
        for name, array in vectors.arrays.items():
            spans = side_axes(vectors.axes, name)
            array, axes = on_host(array, f"{place.path}: {name}"), list(spans)
            if stacked and 0 in axes:
                array = array[place.layer]
                axes.remove(0)
            if len(axes) != 1:
                raise AdapterError(
                    f"{place.path}: {name} spans several axes of one layer, as no adapter of PEFT"
                    " does; merge it into the base instead"
                )
            side = axes[0] == inputs
            if name in SIDES:
                found["col" if side else "row"] = array
            else:
                found["down" if side else "up"] = array
        return cls(place, *(found.get(name) for name in ("row", "col", "down", "up")))


def _hira(matrix: _Matrix, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """``A`` [2, inputs] and ``B`` [outputs, 2] of scale vectors."""
    inputs, outputs = shape[-2:]
    row = np.zeros(outputs, np.float32) if matrix.row is None else matrix.row
    col = np.zeros(inputs, np.float32) if matrix.col is None else matrix.col
    return np.stack([col, np.ones_like(col)]), np.stack([1 + row, row], axis=1)


def _lora(
    matrices: Sequence[_Matrix], files: dict[str, np.ndarray], weights: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Adds the tensors of low-rank terms to files, and gives their configuration.

    Args:
      matrices: what adapts each matrix.
      files: where the tensors go.
      weights: the frozen weights, where magnitudes are to be written too; else None.
    """
    ranks = {}
    for matrix in matrices:
        module, down, up = matrix.place.module, matrix.down, matrix.up
        assert down is not None and up is not None
        if matrix.col is not None:
            raise AdapterError(
                f"{matrix.place.path}: has a low-rank term and an input-side vector: PEFT has no"
                " adapter of both; merge it into the base instead"
            )
        ranks[module] = down.shape[1]
        files[f"{PREFIX}{module}.lora_A.weight"] = down.T
        files[f"{PREFIX}{module}.lora_B.weight"] = up
        if weights is not None:
            leaf = weights[matrix.place.path]
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise AdapterError(
                    f"{matrix.place.path}: its values are needed for DoRA's magnitudes; give the"
                    " base's parameters"
                )
            weight = matrix.place.of(np.asarray(leaf, np.float32))
            norm = np.linalg.norm(weight + up @ down.T, axis=1)
            row = 0 if matrix.row is None else matrix.row
            files[f"{PREFIX}{module}.lora_magnitude_vector"] = (1 + row) * norm
    rank = max(ranks.values())
    other = {f"^{re.escape(module)}$": r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": weights is not None,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _modules(
    adapter: Adapter, known: Sequence[Place], files: dict[str, np.ndarray], task_type: str
) -> list[str] | None:
    """Adds what trained fully to files, as whole modules, whose names it gives."""
    if lacking := sorted(adapter.full.keys() - {place.path for place in known}):
        raise AdapterError(f"{lacking[0]}: is none of the checkpoint's tensors that are given")
    heads = [module for module in _HEADS if task_type == "SEQ_CLS"]

    def holder(place: Place) -> str:
        first = place.name.partition(".")[0]
        return first if first in heads else place.module

    chosen = dict.fromkeys(holder(place) for place in known if place.path in adapter.full)
    for place in known:
        if (module := holder(place)) not in chosen:
            continue
        if place.path not in adapter.full:
            raise AdapterError(
                f"{place.path}: is frozen, and parameters that trained share the module {module}"
                " with it: PEFT saves modules whole; train all of it, or merge the adapter into the"
                " base"
            )
        array = on_host(adapter.full[place.path], place.path)
        files[f"{PREFIX}{place.name}"] = place.of(array)
    return [*chosen] or None


# Reading


def load(folder: str | os.PathLike, params: Any, tensors: Iterable[Row]) -> Adapter:
    """Reads an adapter that PEFT wrote: LoRA, DoRA, VeRA, (IA)^3, or HiRA as :func:`save` gives it.

    Args:
      folder: an adapter folder of PEFT, with safetensors.
      params: the base parameters. Their values are read for DoRA, and for (IA)^3 where it scales a
        layer with a bias; else ``jax.ShapeDtypeStruct`` will do.
      tensors: the table of the checkpoint's tensors, ``models.tensors(config)``.

    Returns:
      The adapter. (IA)^3 of PEFT scales biases too: they are among ``full``.

    Raises:
      AdapterError: another kind of adapter, an option that changes what it computes and is not
        known here, a tensor that is missing, unexpected or of a wrong shape, a damaged file.
    """
    config, data = read_folder(Path(folder))
    with refusing(f"{folder} is malformed"):
        found = {k: v.astype(np.float32) for k, v in safetensors.numpy.load(data).items()}
        return _Reader(config, found, params, list(tensors)).adapter()


# What a configuration may say without a change in what the adapter computes once it is trained.
_HARMLESS = {
    "adapter_model_name", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "peft_type", "peft_version", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights",
    "init_ia3_weights", "init_weights", "lora_dropout", "vera_dropout", "hira_dropout",
    "d_initial", "projection_prng_key", "save_projection", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "lora_ga_config", "monteclora_config",
}  # fmt: skip
# What is read.
_READ = {
    "LORA": {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"},
    "VERA": {"r"},
    "IA3": {"feedforward_modules"},
    "HIRA": {"r"},
}
_KINDS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "IA3": ("ia3_l",),
    "HIRA": ("hira_A", "hira_B"),
}


class _Reader:
    """One adapter of PEFT: its configuration and tensors, and the base that it is for."""

    def __init__(
        self,
        config: Mapping[str, Any],
        files: Mapping[str, np.ndarray],
        params: Any,
        tensors: Sequence[Row],
    ):
        self.config = config
        self.files = dict(sorted(files.items()))  # a file of safetensors has no order
        self.kind = config.get("peft_type")
        self.arrays = paths.arrays(params)
        shapes = {path: leaf.shape for path, leaf in self.arrays.items()}
        self.places = {place.name: place for place in places(tensors, shapes)}

    def adapter(self) -> Adapter:
        """The adapter, once all that the files hold is understood."""
        if self.kind not in _KINDS:
            raise AdapterError(
                f"peft_type is {self.kind!r}: this reads {', '.join(_KINDS)}; merge it with PEFT,"
                " and load the merged model"
            )
        known = _HARMLESS | _READ[self.kind]
        off: list[Any] = [None, False, "none", [], {}]
        for name, value in self.config.items():
            if name not in known and value not in off:
                raise AdapterError(
                    f"{name} is {value!r}: what that changes is not known here; merge it with PEFT,"
                    " and load the merged model"
                )
        read = {"LORA": self._lora, "VERA": self._vera, "IA3": self._ia3, "HIRA": self._hira}
        shared = [self.files.pop(f"base_model.vera_{side}", None) for side in "AB"]
        modules: dict[str, dict[str, np.ndarray]] = {}
        full: dict[str, dict[int | None, np.ndarray]] = {}
        for key, array in self.files.items():
            if not np.isfinite(array).all():
                value = array[~np.isfinite(array)][0]
                raise AdapterError(f"{key}: is {value} somewhere; take an earlier checkpoint")
            name = key.removeprefix(PREFIX)
            kind = next((k for k in _KINDS[self.kind] if name.endswith(f".{k}")), None)
            if kind is not None:
                modules.setdefault(name.removesuffix(f".{kind}"), {})[kind] = array
            elif (place := self.places.get(name)) is not None:
                full.setdefault(place.path, {})[place.layer] = array.T if place.transpose else array
            else:
                raise AdapterError(
                    f"{key}: is unexpected: the base has no such tensor;"
                    f" {paths.suggest(name, self.places)}"
                )
        weights: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
        for module, arrays in modules.items():
            place = self.places.get(f"{module}.weight")
            if place is None or not place.transpose:
                raise AdapterError(f"{module}: is no linear layer of the base")
            made = read[self.kind](module, place, arrays, shared)
            for path, (layer, bias) in made.pop("bias", {}).items():
                full.setdefault(path, {})[layer] = bias
            weights.setdefault(place.path, {})[place.layer] = made
        scales = {path: self._stacked(path, layers) for path, layers in sorted(weights.items())}
        trained = {path: self._whole(path, layers) for path, layers in sorted(full.items())}
        adapter = Adapter(scales, trained, base_model=self.config.get("base_model_name_or_path"))
        adapter.check(self.arrays)
        return adapter

    def _lora(
        self, module: str, place: Place, arrays: Mapping[str, np.ndarray], _: Any
    ) -> dict[str, Any]:
        a, b = self._pair(module, arrays, "lora_A.weight", "lora_B.weight")
        rank = a.shape[0]
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        found = {"down": a.T, "up": b * np.float32(scaling)}
        if self.config.get("use_dora"):
            if "lora_magnitude_vector" not in arrays:
                raise AdapterError(f"{module}.lora_magnitude_vector: is missing")
            weight = place.of(np.asarray(self._values(place.path), np.float32))
            norm = np.linalg.norm(weight + found["up"] @ a, axis=1)
            found["row"] = arrays["lora_magnitude_vector"].reshape(-1) / norm - 1
        return found

    def _vera(
        self, module: str, place: Place, arrays: Mapping[str, np.ndarray], shared: Any
    ) -> dict[str, Any]:
        if any(array is None for array in shared):
            raise AdapterError(
                "vera_A, vera_B: are missing: save the adapter with save_projection=True"
            )
        a, b = shared
        up, down = self._pair(module, arrays, "vera_lambda_b", "vera_lambda_d")
        inputs, outputs = self.arrays[place.path].shape[-2:]
        return {"down": (a[:, :inputs] * down[:, None]).T, "up": b[:outputs] * up[:, None]}

    def _ia3(
        self, module: str, place: Place, arrays: Mapping[str, np.ndarray], _: Any
    ) -> dict[str, Any]:
        delta = arrays["ia3_l"] - 1
        if delta.shape[0] == 1 and delta.ndim == 2 and delta.shape[1] != 1:
            return {"col": delta[0]}
        found: dict[str, Any] = {"row": delta.reshape(-1)}
        bias = self.places.get(f"{module}.bias")
        if bias is not None:  # there the layer's whole output is scaled
            value = bias.of(np.asarray(self._values(bias.path), np.float32))
            found["bias"] = {bias.path: (bias.layer, value * (1 + found["row"]))}
        return found

    def _hira(
        self, module: str, place: Place, arrays: Mapping[str, np.ndarray], _: Any
    ) -> dict[str, Any]:
        a, b = self._pair(module, arrays, "hira_A", "hira_B")
        if a.shape[0] != 2 or (a[1] != 1).any() or (b[:, 0] != 1 + b[:, 1]).any():
            raise AdapterError(
                f"{module}: is no pair of scale vectors but a HiRA adapter of another shape; merge"
                " it with PEFT, and load the merged model"
            )
        return {"row": b[:, 1], "col": a[0]}

    def _values(self, path: str) -> Any:
        leaf = self.arrays[path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise AdapterError(f"{path}: its values are needed; give the base's parameters")
        return leaf

    def _pair(
        self, module: str, arrays: Mapping[str, np.ndarray], *names: str
    ) -> tuple[np.ndarray, np.ndarray]:
        if lacking := [name for name in names if name not in arrays]:
            raise AdapterError(f"{module}.{lacking[0]}: is missing")
        first, second = (arrays[name] for name in names)
        return first, second

    def _stacked(
        self, path: str, layers: Mapping[int | None, dict[str, np.ndarray]]
    ) -> ScaleVectors:
        """The arrays of a parameter, of those of its layers; a layer without any is unadapted."""
        shape = self.arrays[path].shape
        names = dict.fromkeys(name for made in layers.values() for name in made)
        ranks = [made["down"].shape[-1] for made in layers.values() if "down" in made]
        roles = ["stack"] * (None not in layers)
        roles.append("in" if {"col", "down"} & {*names} else "-")
        roles.append("out" if {"row", "up"} & {*names} else "-")
        found: dict[str, Any] = {"row": None, "col": None}
        for name in names:
            size = shape[-1] if name in ("row", "up") else shape[-2]
            tail = (max(ranks),) if name in ("down", "up") else ()
            whole = np.zeros((shape[0] if None not in layers else 1, size, *tail), np.float32)
            for layer, made in layers.items():
                if (array := made.get(name)) is not None:  # a smaller rank has zeros behind
                    if array.ndim != whole.ndim - 1 or array.shape[0] != size:
                        has, needs = array.shape, (size, *array.shape[1:])
                        raise AdapterError(f"{path}: {name} has shape {has}, not {needs}")
                    place: Any = (layer or 0, *map(slice, array.shape))
                    whole[place] = array
            found[name] = jnp.asarray(whole if None not in layers else whole[0])
        return ScaleVectors(**found, axes=" ".join(roles))

    def _whole(self, path: str, layers: Mapping[int | None, np.ndarray]) -> jax.Array:
        if None in layers:
            return jnp.asarray(layers[None])
        count = self.arrays[path].shape[0]
        if missing := sorted({*range(count)} - {*layers}):
            base = np.asarray(self._values(path), np.float32)
            layers = {**layers, **{i: base[i] for i in missing}}
        return jnp.asarray(np.stack([layers[i] for i in range(count)]))


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's value of a pattern, whose keys are names' ends or regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
