"""One path grammar for every tree: "/"-joined keys, whatever the containers are.

A Linen dict, an ``nnx.State``, an Equinox module, lists and dataclasses all flatten to the same
kind of path. The box around an array (``nnx.Param``, ``nn.Partitioned``) is no part of it: its key,
a last attribute called ``value`` that has no sibling, is dropped, so ``params/dense/kernel`` names
the same weight before and after boxing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import GetAttrKey

Pattern = str | Sequence[str]


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Flattens a tree to its paths, its leaves and its treedef, all in one order.

    Raises:
      ValueError: two leaves have the same path (a key that contains "/").

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})[:2]
    (['dense/bias', 'dense/kernel'], [2, 1])
    """
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = [(), *(key for key, _ in with_keys), ()]
    paths = [
        jax.tree_util.keystr(_unboxed(*around), simple=True, separator="/")
        for around in zip(keys, keys[1:], keys[2:], strict=False)
    ]
    if len(set(paths)) != len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(f"{', '.join(twice)}: two leaves of the tree have this path; rename a key")
    return paths, [leaf for _, leaf in with_keys], treedef


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree with the leaves at the given paths replaced.

    >>> replace({"a": 1, "b": [2, 3]}, {"b/1": 4})
    {'a': 1, 'b': [2, 4]}
    """
    paths, old, treedef = flatten(tree)
    return treedef.unflatten(map(leaves.get, paths, old))


def arrays(tree: Any) -> dict[str, Any]:
    """Returns the tree's arrays by path, in the tree's order; other leaves are left out.

    >>> list(arrays({"dense": {"kernel": np.ones(3), "activation": abs}}))
    ['dense/kernel']
    """
    paths, leaves, _ = flatten(tree)
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_array(leaf)}


def partition_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the arrays of a tree, and a function that rebuilds the tree with others.

    >>> arrays, build = partition_arrays({"w": np.ones(2), "name": "relu"})
    >>> build(["other"])
    {'name': 'relu', 'w': 'other'}
    """
    leaves, treedef = jax.tree.flatten(tree)

    def build(arrays: Sequence[Any]) -> Any:
        source = iter(arrays)
        new = [next(source) if is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(treedef, new)

    return [leaf for leaf in leaves if is_array(leaf)], build


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: an array, a tracer or a ShapeDtypeStruct."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not np.isscalar(leaf)


def named_sharding(leaf: Any) -> NamedSharding | None:
    """Returns the ``NamedSharding`` of an array or a ShapeDtypeStruct, or None."""
    traced = isinstance(leaf, jax.core.Tracer)
    sharding = None if traced else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def matcher(pattern: Pattern) -> Callable[[str], bool]:
    """Returns a predicate on paths, from a full-match regex or a sequence of path suffixes.

    Raises:
      ValueError: the regular expression does not compile, or an empty pattern.

    >>> matcher(r".*/(q|v)/kernel")("layers/q/kernel"), matcher(["q/kernel"])("layers/qq/kernel")
    (True, False)
    """
    if not pattern:
        raise ValueError("an empty pattern selects nothing: give a regular expression or suffixes")
    if isinstance(pattern, str):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
        return lambda path: regex.fullmatch(path) is not None
    return lambda path: any(path == s or path.endswith("/" + s) for s in pattern)


def suggest(pattern: Pattern, paths: Iterable[str], count: int = 5) -> str:
    """Returns a line that names the paths most similar to a pattern, for error messages."""
    asked = pattern if isinstance(pattern, str) else pattern[0]
    words = set(re.findall(r"\w+", asked))

    def similarity(path: str) -> float:
        shared = len(words & set(re.findall(r"\w+", path)))
        return shared + difflib.SequenceMatcher(None, asked, path).ratio()

    best = sorted(paths, key=similarity, reverse=True)[:count]
    return "nearest: " + ", ".join(best) if best else "the tree holds no arrays"


def _unboxed(before: tuple, keys: tuple, after: tuple) -> tuple:
    """A key path without its box's key; the leaves before and after it would show a sibling."""
    parent = keys[:-1]
    boxed = bool(parent) and keys[-1] == GetAttrKey("value")
    siblings = any(other[: len(parent)] == parent for other in (before, after))
    return parent if boxed and not siblings else keys
