"""Folders of the Hugging Face format: where they are found, and which of their files belong."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub

from hyperadapt_jax.models.checkpoint.table import CheckpointError, duplicates, first_few

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What belongs to a model together with its weights, as names within its folder. Data alone, no
# code: how text becomes tokens and a chat one text, how the model is to generate, what
# sentence-transformers does with its outputs, and the terms of use. A README speaks of the weights
# that were there.
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map*.json",
    "added_tokens*.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "encoder.json",
    "merges*.txt",
    "dict*.txt",
    "bpe.codes",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*.jinja",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/*.json",
    "[0-9]_*/*.txt",
    "[0-9]_*/*.safetensors",
    "LICENSE*",
    "NOTICE*",
)
# What is fetched from the hub with them, if only to see that the weights are quantized, and what is
# not, whatever its name: other folders than those above, and code.
_WANTED = ("config.json", "model*.safetensors", INDEX, "hf_quant_config.json")
_UNWANTED = ("[!0-9a]*/*", "a[!d]*/*", "*/*/*", "*.py", *PICKLES)
# Where tools keep files by their contents, and link to them from where they are used: the hub's
# cache, git-annex, DVC and Git LFS.
_STORE = re.compile(r"/blobs/[^/]+$|/annex/objects/|/[0-9a-f]{2}/[0-9a-f]{30,}$")


def resolve(
    path_or_name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Finds a checkpoint's folder: a local one first, else a repository of the Hugging Face hub.

    From the hub come the configuration, the safetensors files at the repository's root and what
    belongs to them, as the tokenizer; no code, no pickles, no copies in other formats.

    Args:
      path_or_name: a folder, or a repository name such as "meta-llama/Llama-3.2-1B".
      revision: a branch, tag or commit of the repository; ignored for a local folder.
      cache_dir: where downloads are kept; the hub's usual cache by default.

    Raises:
      FileNotFoundError: neither a folder nor a repository that can be read, offline included.
    """
    name, folder = str(path_or_name), expand_home(path_or_name)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"no folder {name!r}, and it cannot be a repository of the hub")
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            allow_patterns=[*_WANTED, *_COMPANIONS],
            ignore_patterns=[*_UNWANTED],
        )
    except Exception as error:  # the client's own, the network's, the file system's: one answer
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"no folder {name!r}, and no repository of that name{at} could be downloaded from the "
            f"hub: {type(error).__name__}{': ' + reason[0] if reason else ''}. Check the name, the "
            "network (HF_HUB_OFFLINE) and, for a gated or private repository, the login (HF_TOKEN)"
        ) from error
    return Path(found)


def expand_home(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` is replaced by the user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{path}: there is no such user: give the whole path") from None


def file_inside(folder: Path, name: str, referrer: str = "") -> Path:
    """The file of a folder, or an error where its name or a link leads out of the folder.

    A link may lead to where a tool keeps files by their contents, as the hub's cache does, and to a
    file of the same name: neither can pass off another file of this machine as one of a model's.
    """
    where = f"{folder / referrer} names {name!r}" if referrer else f"{folder} holds {name!r}"
    parts = tuple(name.replace("\\", "/").split("/"))
    if Path(name).is_absolute() or {"..", ""} & {*parts}:
        raise CheckpointError(f"{where}, which is no file inside the folder")
    try:
        target = (folder / name).resolve()
        target.exists()  # an error where the file system can have no such name
        inside = target.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}, which is no name of a file: {error}") from error
    namesake = target.parts[-len(parts) :] == parts
    if not (inside or namesake or _STORE.search(target.as_posix())):
        raise CheckpointError(
            f"{where}, a link that leads outside the folder, to {target}: put the file there itself"
        )
    return folder / name


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Reads a JSON object from a file of a folder.

    Raises:
      CheckpointError: the file is missing, outside the folder, no JSON object, or has a key twice.
    """
    file = file_inside(Path(folder), name)
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once, of which plain `json` would keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"{first_few(duplicates(key for key, _ in pairs))} stands there twice")
    return result


def _is_companion(name: str) -> bool:
    """Whether a file, by its name within a folder, is one of those that belong to a model."""
    matches = (p for p in _COMPANIONS if p.count("/") == name.count("/"))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in matches)


def is_companion_folder(folder: Path) -> bool:
    """Whether a folder within a model's holds what belongs to the model, and nothing else."""
    names = [f"{folder.name}/{file.name}" for file in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and all(map(_is_companion, names))


def companions(source: Path) -> list[str]:
    """The names of a folder's files that belong to the model; links are followed with care."""
    files = [file for file in (*source.glob("*"), *source.glob("*/*")) if file.is_file()]
    names = sorted(file.relative_to(source).as_posix() for file in files)
    kept = [name for name in names if _is_companion(name)]
    for name in kept:
        file_inside(source, name)
    for name in names:
        pickled = "/" in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in PICKLES)
        if pickled and _is_companion(str(Path(name).with_suffix(".safetensors"))):
            if not list((source / name).parent.glob("*.safetensors")):
                warnings.warn(
                    f"{source / name} could run code when opened and is not copied: the export"
                    " lacks this part of the model; convert it once to safetensors",
                    stacklevel=4,
                )
    return kept
