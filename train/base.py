"""The base model of a run: its configuration, weights, tokenizer and fingerprint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import models, paths
from hyperadapt_jax.models.checkpoint import hub
from hyperadapt_jax.models.layers import check_attention

from .errors import InputError, first_line
from .options import ModelOptions
from .parallel import processes
from .parallel.mesh import Layout

# Without any of these, transformers makes a tokenizer that knows no word, and says nothing.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
)


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen model.

    Attributes:
      name: what the user calls it: a folder or a repository.
      config: its architecture.
      fn: ``fn(params, tokens, ...)``, as `hyperadapt_jax.models.functional` gives.
      params: nested dict of arrays; of shapes and dtypes alone where it was only described.
      missing: paths of the parameters that the checkpoint lacks, such as a new head.
      folder: where its files lie.
    """

    name: str
    config: models.Config
    fn: models.auto.Function
    params: Any
    missing: tuple[str, ...]
    folder: Path


def load_abstract(
    options: ModelOptions, labels: int | None = None, layout: Layout | None = None
) -> Base:
    """The model without its weights: nothing is allocated.

    Args:
      options: which model, and its dtypes.
      labels: outputs of a classification head; 1 for regression; None for no head.
      layout: what lies where on several devices; the shapes carry the shardings.

    Raises:
      InputError: there is no such model, or it is none of those known here; an axis of the mesh
        divides nothing of it.
    """
    folder, config = _described(options, labels)
    fn, params = models.functional(models.abstract(config, **_settings(options, layout)))
    if layout is not None:
        params = layout.placed(config, params)
    return Base(options.model, config, fn, params, (), folder)


def load(
    options: ModelOptions,
    labels: int | None = None,
    layout: Layout | None = None,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> Base:
    """The model with its weights.

    Args:
      options: which model, and its dtypes.
      labels: outputs of a classification head; None for no head.
      layout: what lies where on several devices; each gets its own slices of the files.
      seed: of what the checkpoint lacks.
      quiet: show no bar.

    Returns:
      A :class:`Base`.

    Raises:
      InputError: as :func:`load_abstract`, a file that is missing or damaged, or an attention that
        this machine cannot compute.
    """
    folder, config = _described(options, labels)
    try:
        check_attention(options.attention, jnp.dtype(options.dtype), config.head_dim)
    except ValueError as error:
        raise InputError(f"--attention: {error}; leave it out") from error
    where: dict[str, Any] = {}
    if layout is not None:
        where = {"mesh": layout.mesh, "rules": layout.loading(config)}
    try:
        fn, params, report = models.load_functional(
            folder,
            config=config,
            num_labels=labels,
            seed=seed,
            progress=not quiet,
            **where,
            **_settings(options, layout),
        )
    except (ValueError, OSError) as error:
        raise InputError(f"--model {options.model}: {error}") from error
    return Base(options.model, config, fn, params, report.initialized, folder)


def tokenizer(options: ModelOptions) -> Any:
    """The tokenizer in the model's folder, a fast one of transformers.

    It may have added tokens that the model's table lacks, for padding, say: few texts hold one, and
    `check_tokens` finds them.

    Raises:
      InputError: the folder holds none that can be read, or another model's, with more tokens.
    """
    import transformers

    folder = _folder(options)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{folder} holds no tokenizer: copy its files there, as tokenizer.json")
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the file's format makes the reader stumble over
        reason = first_line(error)
        raise InputError(f"{folder} holds no tokenizer that can be read: {reason}") from error
    own = found.get_vocab().keys() - found.get_added_vocab().keys()
    last, size = max(map(found.get_vocab().get, own), default=0), _vocabulary(options)
    if last >= size:
        raise InputError(
            f"{folder} holds another model's tokenizer: its last token is {last}, and the model"
            f" knows {size}"
        )
    return found


def check_tokens(rows: Iterable[Sequence[int]], tokenizer: Any, size: int) -> None:
    """Refuses tokens that the model's table lacks.

    Args:
      rows: the tokens of each example; looked at only where the tokenizer has such tokens.
      tokenizer: the model's.
      size: of the model's table.

    Raises:
      InputError: a row holds one; the message names it.
    """
    if max(tokenizer.get_vocab().values()) < size:
        return
    for number, tokens in enumerate(rows):
        if len(tokens) and (largest := int(max(tokens))) >= size:
            raise InputError(
                f"example {number} holds {tokenizer.convert_ids_to_tokens(largest)!r}, which the"
                f" tokenizer makes token {largest}, and the model knows {size}: take it out of the"
                " text"
            )


def _vocabulary(options: ModelOptions) -> int:
    return models.read_config(_folder(options)).vocab_size


def fingerprint(params: Any) -> str:
    """A digest of every number of a tree, exact on any device and cheap: one pass over memory.

    Args:
      params: any pytree of arrays.

    Returns:
      64 hexadecimal digits. They depend on each path, shape, dtype, bit and place of a bit.

    >>> one = fingerprint({"w": jnp.arange(6.0)})
    >>> one == fingerprint({"w": jnp.arange(6.0)}), one == fingerprint({"w": jnp.arange(6.0)[::-1]})
    (True, False)
    """
    # Made flat, which is faster, an array that is spread over devices would be gathered.
    sums = {
        path: _sums(leaf, flat=paths.named_sharding(leaf) is None)
        for path, leaf in paths.arrays(params).items()
    }
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.arrays(params).items()):
        numbers = [int(n) for n in processes.fetch(sums[path])]
        digest.update(repr((path, leaf.shape, str(leaf.dtype), numbers)).encode())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="flat")
def _sums(array: jax.Array, flat: bool) -> jax.Array:
    """Two sums over an array's bits, modulo 2**32, one of them weighted by the place."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    # Complex or 64-bit numbers: as pieces of 32 bits.
    bits = jax.lax.bitcast_convert_type(array, kinds.get(array.dtype.itemsize, jnp.uint32))
    bits = (bits.reshape(-1) if flat else bits).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place, stride = place + steps * np.uint32(stride % 2**32), stride * bits.shape[axis]
    # An odd factor for each place: two numbers that change places change the sum.
    places = place * np.uint32(2) + np.uint32(1)
    mixed = (bits ^ (bits >> 15)) * (places * np.uint32(2654435761) | np.uint32(1))
    return jnp.stack([bits.sum(dtype=jnp.uint32), mixed.sum(dtype=jnp.uint32)])


def _described(options: ModelOptions, labels: int | None) -> tuple[Path, models.Config]:
    """The model's folder and its architecture, with the head that is asked for."""
    folder = _folder(options)
    try:
        config = models.load_config(folder)
    except (ValueError, OSError) as error:
        raise InputError(f"--model {options.model}: {error}") from error
    if labels is None:
        return folder, config
    if not isinstance(config, models.EncoderConfig):
        raise InputError(
            f"--model {options.model} is a decoder, {config.family}: this recipe needs an encoder"
        )
    return folder, dataclasses.replace(config, num_labels=labels)


def _folder(options: ModelOptions) -> Path:
    try:
        return hub.resolve(options.model, revision=options.revision)
    except FileNotFoundError as error:
        raise InputError(f"--model: {error}") from error


def _settings(options: ModelOptions, layout: Layout | None) -> dict[str, Any]:
    given = {"dtype": options.dtype, "remat": options.remat, "attention": options.attention}
    return given if layout is None else given | {"activations": layout.activations}
