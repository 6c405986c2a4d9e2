"""The house: rooms import downwards only, nothing hides a module, and nothing private of another package is used."""

import ast
import importlib
import itertools
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import saddlejax as sj

PACKAGE = Path(sj.__file__).parent
PAGE = PACKAGE.parent / "docs" / "contributing.md"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",))


def room(parts):
    """The room of a module, given its path below the package: a folder, or a file of its own at the root."""
    return parts[0] if parts else ""


def imported(path):
    """What a file imports of the package, as paths below it; also what a function imports when it is called."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    folder = here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "saddlejax"):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            module = module if node.level else module[1:]
            for name in node.names if not module else [None]:
                yield module if name is None else (*module, name.name)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "saddlejax":
                    yield tuple(name.name.split("."))[1:]


def arrows():
    """Which room imports which, with the file that does."""
    for path in MODULES:
        here = path.relative_to(PACKAGE).with_suffix("").parts
        if here == ("__init__",):
            continue
        for target in imported(path):
            if (to := room(target)) != room(here):
                yield room(here), to, path.relative_to(PACKAGE).as_posix()


def rooms_of_the_page():
    """The rooms in the order in which the page on contributing lists them, from the lowest to the highest."""
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(), re.MULTILINE)
    return [name.removesuffix(".py").strip("/") for row in rows for name in re.findall(r"`([^`]*)`", row)]


def test_rooms_import_from_those_below_them_only():
    order = rooms_of_the_page()
    there = {room(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES} - {"__init__"}
    assert sorted(order) == sorted(there)
    found = list(arrows())
    upwards = [arrow for arrow in found if order.index(arrow[1]) >= order.index(arrow[0])]
    assert upwards == [] and len(found) > 100


def test_nothing_hides_a_module():
    hidden, count = [], 0
    for found in pkgutil.walk_packages([str(PACKAGE)], "saddlejax."):
        if found.name.endswith("__main__"):
            continue
        importlib.import_module(found.name)
        parent, _, name = found.name.rpartition(".")
        count += 1
        if not isinstance(getattr(importlib.import_module(parent), name), ModuleType):
            hidden.append(found.name)
    assert hidden == [] and count > 50


PRIVATE = re.compile(
    r"jax\.extend|jax\._src|(?:equinox|eqx)\.internal|\beqxi\b|_primitive"
    r"|\b(?:jax|equinox|eqx|diffrax|dfx|optimistix|optx|lineax|lx|optax)(?:\.\w+)*\._[a-z]"
)


def test_nothing_private_of_another_package_is_used():
    lines = itertools.chain.from_iterable(
        ((path.relative_to(PACKAGE).as_posix(), line) for line in path.read_text().splitlines()) for path in MODULES
    )
    assert [(path, line) for path, line in lines if PRIVATE.search(line)] == []
