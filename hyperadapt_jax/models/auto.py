"""Models from configurations and folders, as functions of their parameters, and what to adapt."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from hyperadapt_jax import paths
from hyperadapt_jax.models.checkpoint import hub, reading, writing
from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Report, Tensor
from hyperadapt_jax.models.decoder.config import DecoderConfig
from hyperadapt_jax.models.decoder.model import Decoder
from hyperadapt_jax.models.encoder.config import EncoderConfig
from hyperadapt_jax.models.encoder.model import Encoder
from hyperadapt_jax.models.layers import UNSHARDED, ActivationSharding
from hyperadapt_jax.models.registry import Config, config_to_dict, family_of, read_config

Model = Decoder | Encoder
Params = Mapping[str, Any]

# Which projections of the layers each preset takes, by their names, with their roles; None for all.
PRESETS: dict[str, dict[str, frozenset[str] | None]] = {
    "qv": {"stack in out": frozenset({"q", "v"})},
    "qkvo": {"stack in out": frozenset({"q", "k", "v", "o"})},
    "qkvud": {"stack in out": frozenset({"q", "k", "v", "up", "down"})},
    "all-linear": {"stack in out": None},
    "ia3": {"stack - out": frozenset({"k", "v"}), "stack in -": frozenset({"down"})},
}
_FUSED = {"qkv": frozenset({"q", "k", "v"}), "gate_up": frozenset({"gate", "up"})}


def create(config: Config, *, seed: int = 0, **options: Any) -> Model:
    """Makes a model with new random parameters.

    Args:
      config: the architecture.
      seed: of the initial parameters.
      **options: ``dtype``, ``param_dtype``, ``remat``, ``attention``, ``activations``, as `Decoder`
        and `Encoder` take them.

    Raises:
      ValueError: an option has an unknown value.
    """
    return family_of(config).module(config, rngs=nnx.Rngs(params=seed), **options)


def abstract(config: Config, **options: Any) -> Model:
    """Makes a model whose parameters are shapes and dtypes alone, so that nothing is allocated.

    Args:
      config: the architecture.
      **options: as for `create`.

    Returns:
      The model, with a `jax.ShapeDtypeStruct` for each parameter.
    """
    return nnx.eval_shape(lambda: create(config, **options))


@dataclasses.dataclass(frozen=True)
class Function:
    """A model without its parameters: ``function(params, *args)`` is ``model(*args)``.

    Functions of models of the same configuration and options are equal, so that a compiled
    program is found again.

    Attributes:
      graph: the model without its parameters.
      activations: how its activations are spread over a mesh.
    """

    graph: nnx.GraphDef
    activations: ActivationSharding = UNSHARDED

    def __call__(
        self,
        params: Params,
        *args: Any,
        method: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the model with the given tree of parameters.

        Args:
          params: nested dict of arrays.
          *args: what the model takes.
          method: a function of the model and of what follows ``params``, to be called instead of
            the model itself, as in Flax Linen's ``apply``: a method such as `Decoder.hidden`, or
            any other, that computes a loss, say.
          **kwargs: what the model takes by name.
        """
        model = nnx.merge(self.graph, params)
        return model(*args, **kwargs) if method is None else method(model, *args, **kwargs)


def functional(model: Model) -> tuple[Function, Params]:
    """Splits a model into a pure function and its tree of parameters.

    Args:
      model: a model, abstract or not.

    Returns:
      ``(fn, params)``: ``fn(params, *args, **kwargs)`` equals ``model(*args, **kwargs)``, and
      ``params`` is a nested dict of arrays with paths as ``layers/q/kernel``.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="qwen3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4))
    >>> fn, params = models.functional(models.create(config))
    >>> params["layers"]["q"]["kernel"].shape
    (2, 8, 8)
    >>> fn(params, jax.numpy.ones((1, 3), int)).shape
    (1, 3, 9)
    """
    graph, state = nnx.split(model)
    return Function(graph, model.activations), nnx.to_pure_dict(state)


def from_params(config: Config, params: Params, **options: Any) -> Model:
    """Makes a model from its parameters.

    Args:
      config: the architecture.
      params: a nested dict as `functional` returns it; the arrays are not copied.
      **options: as for `create`.

    Raises:
      ValueError: a parameter is missing, extra or misshapen.
    """
    fn, abstract_params = functional(abstract(config, **options))
    wanted, given = paths.arrays(abstract_params), paths.arrays(params)
    for path in sorted(wanted.keys() ^ given.keys()):
        raise ValueError(f"{path}: {'missing' if path in wanted else 'not a parameter'}")
    for path, leaf in given.items():
        if leaf.shape != wanted[path].shape:
            raise ValueError(f"{path}: expected {wanted[path].shape}, found {leaf.shape}")
    return nnx.merge(fn.graph, params)


class NewParametersWarning(UserWarning):
    """A checkpoint lacks parameters of the model, which were newly initialized.

    Attributes:
      paths: those parameters.
    """

    def __init__(self, folder: str | os.PathLike[str], paths: Sequence[str]):
        super().__init__(
            f"{folder}: newly initialized, since the checkpoint lacks them: {', '.join(paths)}"
        )
        self.paths = tuple(paths)


def load(
    path_or_name: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, PartitionSpec]] = (),
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Model:
    """Loads a model from a Hugging Face folder.

    Args:
      path_or_name: a folder, or a repository of the hub such as ``Qwen/Qwen2.5-0.5B``.
      num_labels: give an encoder a classification head with this many outputs (1 for regression),
        whether or not the checkpoint has one.
      mesh: devices to spread the parameters over; all on the default device if not given.
      rules: ``(pattern, PartitionSpec)`` pairs: how a parameter whose path matches is spread.
      revision: branch, tag or commit of the repository.
      cache_dir: where downloads are kept.
      seed: of parameters that the checkpoint lacks, as a new head.
      progress: show a bar on long loads.
      **options: ``dtype``, ``param_dtype``, ``remat``, ``attention``, ``activations``, as `Decoder`
        and `Encoder` take them.

    Returns:
      The model. A `NewParametersWarning` names the parameters of the head that the checkpoint
      lacked, or had for another number of labels. Without a head, the encoder has a pooler if the
      checkpoint has one.

    Raises:
      FileNotFoundError: there is no such folder or repository.
      ValueError: the configuration or the weights are not those of a model known here.
    """
    folder = hub.resolve(path_or_name, revision=revision, cache_dir=cache_dir)
    fn, params, report = load_functional(
        folder,
        num_labels=num_labels,
        mesh=mesh,
        rules=rules,
        seed=seed,
        progress=progress,
        **options,
    )
    if report.initialized:
        warnings.warn(NewParametersWarning(folder, report.initialized), stacklevel=2)
    return nnx.merge(fn.graph, params)


def load_functional(
    path_or_name: str | os.PathLike[str],
    *,
    config: Config | None = None,
    num_labels: int | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, PartitionSpec]] = (),
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Function, Params, Report]:
    """Loads a model from a Hugging Face folder as a pure function and its tree of parameters.

    Args:
      path_or_name: as for `load`.
      config: the architecture, as `load_config` gives it, where it is known already.
      num_labels, mesh, rules, revision, cache_dir, seed, progress: as for `load`.
      **options: as for `create`.

    Returns:
      ``(fn, params, report)``: the first two as `functional` gives them; the report names the
      parameters that the checkpoint filled, and those that it lacked and that are new.

    Raises:
      FileNotFoundError: there is no such folder or repository.
      ValueError: the configuration or the weights are not those of a model known here.

    >>> import tempfile
    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="bert", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = models.export(folder, models.create(config))
    ...     fn, params, report = models.load_functional(folder, num_labels=3)
    >>> report.initialized
    ('classifier/out/bias', 'classifier/out/kernel')
    """
    folder = hub.resolve(path_or_name, revision=revision, cache_dir=cache_dir)
    checkpoint = Checkpoint(folder)
    if config is None:
        config = _config_of(checkpoint)
    renewed: tuple[str, ...] = ()
    if num_labels is not None:
        if not isinstance(config, EncoderConfig) or num_labels < 1:
            raise ValueError(
                f"num_labels={num_labels}: expected a positive number and an encoder; "
                f"{folder} is {config.family}"
            )
        config = dataclasses.replace(config, num_labels=num_labels)
        renewed = _other_labels(config, checkpoint)
    fn, abstract_params = functional(abstract(config, **options))

    def initial(path: str) -> jax.Array:
        def make() -> jax.Array:
            _, fresh = functional(create(config, seed=seed, **options))
            return paths.arrays(fresh)[path]

        # Compiled, so that nothing but this one parameter is ever allocated.
        return jax.jit(make)()

    family = family_of(config)
    params, report = reading.load(
        checkpoint,
        family.tensors(config),
        abstract_params,
        ignored=family.ignored(config),
        renewed=renewed,
        initial=initial,
        mesh=mesh,
        rules=rules,
        progress=progress,
    )
    return fn, params, report


def load_config(folder: str | os.PathLike[str]) -> Config:
    """Reads the configuration of a folder's model: its ``config.json``, as the weights have it.

    A head that is stored together with the embedding is the head, whatever ``tie_word_embeddings``
    says, unless both are equal; and a pooler is there if it is stored. A folder without weights is
    described by its ``config.json`` alone.

    Args:
      folder: a Hugging Face model folder.

    Returns:
      A `DecoderConfig` or an `EncoderConfig`.

    Raises:
      FileNotFoundError: there is no ``config.json``.
      ValueError: the configuration or the weights are not those of a model known here.
    """
    return _config_of(Checkpoint(Path(folder)))


def _config_of(checkpoint: Checkpoint) -> Config:
    config = read_config(checkpoint.folder)
    return family_of(config).as_stored(config, checkpoint) if checkpoint.exists() else config


def _other_labels(config: EncoderConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The parameters of the head that the checkpoint has for another number of labels."""
    last = [row for row in tensors(config) if row.path.startswith("classifier/out/")]
    stored = [checkpoint.tensors[row.name] for row in last if row.name in checkpoint.tensors]
    fits = all(tensor.shape[:1] == (config.num_labels,) for tensor in stored)
    return () if fits else tuple(row.path for row in last)


def export(
    folder: str | os.PathLike[str],
    model: Model,
    params: Params | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    leaf: Callable[[str], jax.Array] | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a model as a Hugging Face folder that any reader of the format can load.

    Args:
      folder: where to write; it appears when it is complete.
      model: the model, abstract or not.
      params: parameters to write instead of the model's own, as merged ones.
      source: the folder that the model was loaded from. What belongs to it is copied: tokenizer,
        chat templates, generation settings, the files of sentence-transformers, the license; and
        of an encoder, the head of its architecture that the model leaves out.
      leaf: called with each parameter's path, gives the parameter to write there, so that they
        need not all exist at once.
      dtype: dtype to store; each parameter's own if not given.
      max_shard_size: most bytes of one file, as a number or as ``5GB``.
      overwrite: replace a folder that is not empty.
      progress: show a bar on long exports.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder is not empty and ``overwrite`` is not set.
      ValueError: ``params`` are not the model's, or ``dtype`` is no dtype of weights.
    """
    config = model.config
    raw: dict[str, Any] = config_to_dict(config)
    carried: tuple[str, ...] = ()
    if source is not None:
        source = hub.resolve(source)
        checkpoint = Checkpoint(source)
        described, theirs = _config_of(checkpoint), hub.read_json(source, "config.json")
        raw = _config_of_export(config, described, theirs)
        if isinstance(config, EncoderConfig) and config == described and config.num_labels is None:
            carried = _other_heads(config, checkpoint, theirs)
            if _lacks_head(config, raw.get("architectures") or (), carried):
                raw |= {"architectures": config_to_dict(config)["architectures"]}
    return writing.export(
        folder,
        tensors(config),
        functional(model)[1] if params is None else params,
        config=raw,
        source=source,
        carried=carried,
        leaf=leaf,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def _config_of_export(
    config: Config, described: Config, theirs: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of ``config.json``: the source's, which say more, where they are of this model."""
    ours = config_to_dict(config)
    # Remote code stays behind, and these are the model's own.
    dropped, own = {"auto_map"}, set()
    if isinstance(config, DecoderConfig):
        own = {"tie_word_embeddings"} & theirs.keys()
    elif isinstance(described, EncoderConfig) and config.num_labels != described.num_labels:
        described = dataclasses.replace(described, num_labels=config.num_labels)
        own = {"architectures", "id2label", "label2id"}
        dropped |= {*own, "num_labels", "_num_labels", "problem_type", "finetuning_task"}
    if config != described:
        return ours
    kept = {name: value for name, value in theirs.items() if name not in dropped}
    return kept | {name: ours[name] for name in sorted(own) if name in ours}


def _lacks_head(config: Config, architectures: Sequence[str], names: Sequence[str]) -> bool:
    """Whether an architecture has a head of which no tensor is there: readers would make one up."""
    heads = family_of(config).heads
    wanted = [heads[end] for end in heads for name in architectures if name.endswith(end)]
    return not all(any(re.fullmatch(head, name) for name in names) for head in wanted)


def _other_heads(
    config: EncoderConfig, checkpoint: Checkpoint, raw: Mapping[str, Any]
) -> tuple[str, ...]:
    """The tensors of the heads that an encoder leaves out, but for a tied copy of the embedding.

    They are written as they are, so that the architecture of ``config.json`` is there: a head is
    frozen like all else that is not trained.
    """
    heads = re.compile("|".join(family_of(config).heads.values()))
    names = tuple(name for name in checkpoint.tensors if heads.fullmatch(name))
    (row,) = (row for row in tensors(config) if row.path == "embed/words/embedding")
    words = checkpoint.name_of(row)
    if raw.get("tie_word_embeddings") is False or words is None:
        return names
    return tuple(name for name in names if not checkpoint.equal(name, words))


def tensors(config: Config) -> tuple[Tensor, ...]:
    """The table of a model's tensors: name in the checkpoint, path among the parameters.

    Args:
      config: the architecture.

    Returns:
      One entry per parameter.
    """
    return family_of(config).tensors(config)


def logical_axes(config: Config) -> dict[str, str]:
    """What each axis of each parameter stands for.

    Args:
      config: the architecture.

    Returns:
      By the parameter's path, one word for each of its axes, outermost first: the words that
      `Tensor.axes` lists.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="qwen3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4))
    >>> axes = models.logical_axes(config)
    >>> axes["layers/q/kernel"], axes["embed/embedding"]
    ('layers embed heads', 'vocab embed')
    """
    return {tensor.path: tensor.axes for tensor in tensors(config)}


def matrices(config: Config) -> dict[str, str]:
    """Returns the roles of the axes of every matrix among a model's parameters.

    Projections and embeddings are matrices, norms and biases are not. The matrices of the layers,
    with a ``stack`` axis, are those that presets choose from and that Muon is meant for; the
    embeddings, whose rows are the inputs, and the head are usually left to Adam.

    Args:
      config: the architecture.

    Returns:
      By the parameter's path, the role of each axis as `hyperadapt_jax.plan` takes them.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="phi3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    >>> roles = models.matrices(config)
    >>> roles["layers/qkv/kernel"], roles["embed/embedding"], "norm/scale" in roles
    ('stack in out', 'in out', False)
    """
    found = {}
    for path, axes in logical_axes(config).items():
        stacked = axes.startswith("layers ")
        if len(axes.split()) == 2 + stacked:
            found[path] = "stack in out" if stacked else "in out"
    return found


def targets(model: Model | Config, preset: str) -> tuple[tuple[str, str], ...]:
    """The weights that a preset adapts, as ``(pattern, axes)`` pairs.

    Args:
      model: a model or its configuration.
      preset: ``qv``, ``qkvo``, ``qkvud`` (query, key, value, up, down), ``all-linear`` (every
        projection of the layers; never embedding, pooler or head) or ``ia3`` (the output side of
        key and value, the input side of down). A fused matrix is taken whole where it holds any of
        them: in Phi, ``qv`` takes ``qkv``.

    Returns:
      Pairs of a full-match pattern on the "/"-joined path and the roles of the weight's axes.

    Raises:
      ValueError: there is no such preset.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="phi3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    >>> models.targets(config, "all-linear")
    (('.*/(qkv|o|gate_up|down)/kernel', 'stack in out'),)
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
    config = model if isinstance(model, Config) else model.config
    linears = [
        path.split("/")[-2] for path, roles in matrices(config).items() if roles == "stack in out"
    ]
    pairs = []
    for roles, wanted in PRESETS[preset].items():
        names = [n for n in linears if wanted is None or wanted & _FUSED.get(n, {n})]
        pairs.append((f".*/({'|'.join(names)})/kernel", roles))
    return tuple(pairs)
