"""Imports point down only: between rooms as the table says, between modules never in a circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each room: its files and folders, and the rooms that it may import besides itself. An import
# counts wherever it stands, in a function or under TYPE_CHECKING too.
ROOMS = {
    "helpers": (
        "hyperadapt_jax/files.py hyperadapt_jax/paths.py hyperadapt_jax/tables.py"
        " hyperadapt_jax/version.py",
        "",
    ),
    "scales": (
        "hyperadapt_jax/scales.py hyperadapt_jax/sharding.py",
        "helpers",
    ),
    "interpreter": (
        "hyperadapt_jax/interpreter",
        "helpers scales",
    ),
    "core": (
        "hyperadapt_jax/adapt.py hyperadapt_jax/adapter.py hyperadapt_jax/algebra.py"
        " hyperadapt_jax/merge.py hyperadapt_jax/peft.py hyperadapt_jax/plan.py"
        " hyperadapt_jax/rank.py hyperadapt_jax/saving.py hyperadapt_jax/trainable.py",
        "helpers scales interpreter",
    ),
    "methods": (
        "hyperadapt_jax/methods",
        "helpers scales core",
    ),
    "package": (
        "hyperadapt_jax/__init__.py",
        "helpers scales core methods",
    ),
    "models": (
        "hyperadapt_jax/models",
        "helpers",
    ),
    "program": (
        "train/__init__.py train/errors.py",
        "helpers",
    ),
    "parallel": (
        "train/parallel",
        "helpers models program",
    ),
    "ground": (
        "train/options.py train/base.py train/methods.py train/files.py",
        "helpers scales core methods package models program parallel",
    ),
    "data": (
        "train/data",
        "helpers program",
    ),
    "metrics": (
        "train/metrics",
        "models program",
    ),
    "run": (
        "train/run",
        "helpers scales core methods package models program parallel ground",
    ),
    "trainer": (
        "train/trainer",
        "helpers scales core methods package models program parallel ground data run",
    ),
    "tasks": (
        "train/tasks",
        "helpers scales core methods package models program parallel ground data metrics trainer",
    ),
    "assembly": (
        "train/assembly.py",
        "helpers scales core methods package models program parallel ground data run trainer tasks",
    ),
    "comparison": (
        "train/comparison",
        "helpers program ground metrics run trainer",
    ),
    "recipes": (
        "train/recipes",
        "helpers scales core methods package models program parallel ground data metrics run"
        " trainer tasks assembly comparison",
    ),
    "entry": (
        "train/__main__.py",
        "package models program parallel ground trainer comparison recipes",
    ),
}


def imports(file: Path, name: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules among those given that a module's text imports."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            origin = ".".join(parts)
            members = (f"{origin}.{alias.name}" for alias in node.names)
            found = [member if member in modules else origin for member in members]
        else:
            continue
        yield from (module for module in found if module in modules)


def problems(root: Path, rooms: dict[str, tuple[str, str]]) -> list[str]:
    """Everything wrong with the imports below a folder: files without a room, arrows, circles."""
    modules, room_of, wrong = {}, {}, []
    for top in {place.split("/")[0] for places, _ in rooms.values() for place in places.split()}:
        for file in (root / top).rglob("*.py"):  # which follows no link, as hyperadapt_jax/train is
            path = file.relative_to(root)
            parts = path.parent.parts if file.stem == "__init__" else path.with_suffix("").parts
            modules[".".join(parts)] = file
            of = {r for r, (places, _) in rooms.items() for p in places.split() if _in(path, p)}
            if len(of) == 1:
                [room_of[".".join(parts)]] = of
            else:
                wrong.append(f"{path} lies in {len(of)} rooms of the table, not in one")

    graph = {name: sorted(set(imports(file, name, modules))) for name, file in modules.items()}
    for name, imported in sorted(graph.items()):
        for other in imported:
            here, there = room_of.get(name), room_of.get(other)
            if here and there and there not in {here, *rooms[here][1].split()}:
                wrong.append(f"{name} ({here}) imports {other} ({there})")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle: {' <- '.join(error.args[1])}")
    return wrong


def _in(path: Path, place: str) -> bool:
    return path == Path(place) or Path(place) in path.parents


def test_imports_point_down_and_make_no_circle():
    assert problems(ROOT, ROOMS) == []


def test_what_is_wrong_is_found(tmp_path):
    files = {
        "app/__init__.py": "",
        "app/floor/__init__.py": "",
        "app/floor/one.py": "from . import two",
        "app/floor/two.py": "",
        "app/roof.py": "from app.floor.one import thing\nimport os, app.floor.two",
    }

    def found(**changed: str) -> list[str]:
        for path, text in (files | changed).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return problems(tmp_path, rooms)

    rooms = {"floor": ("app/floor app/__init__.py", ""), "roof": ("app/roof.py", "floor")}
    assert found() == []
    up = "app.floor.two (floor) imports app.roof (roof)"
    circle = "a circle: app.floor.two <- app.floor.one <- app.floor.two"
    for text in (
        "from app import roof",
        "from app.roof import thing",
        "from .. import roof",
        "from ..roof import thing",
        "import app.roof",
        "def late():\n    import app.roof as roof",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from app.roof import thing",
    ):
        arrow, *rest = found(**{"app/floor/two.py": text})
        assert arrow == up
        assert len(rest) == 1 and rest[0].startswith("a circle: ")  # for roof imports it
    assert found(**{"app/floor/two.py": "def late():\n    from .one import thing"}) in (
        [circle],
        ["a circle: app.floor.one <- app.floor.two <- app.floor.one"],
    )
    assert found(**{"app/new.py": ""}) == ["app/new.py lies in 0 rooms of the table, not in one"]
