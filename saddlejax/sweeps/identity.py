"""What a function computes, as a digest: stores tell functions apart by it.

A function is described by its bytecode and constants and by all that they refer to: default arguments, closed-over and
global values, the fields and the class of an instance, the function behind `jax.jit`, `functools.partial` and the like.
Arrays count by type, shape and bytes. What a library hands out under a name is described by that name. A description is
the same in every process of one Python version; it contains neither addresses nor line numbers.
"""

import builtins
import dataclasses
import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..networks.activations import ACTIVATIONS

NAMED = ("jax", "jaxlib", "numpy", "scipy", "equinox", "diffrax", "optax", "saddlejax")
"""Packages of which the versions are recorded, so that a name says what their functions compute."""

MOVED = {"saddlejax.tasks.losses": "saddlejax.losses"}
"""Modules that have another name now than the one by which stores know their functions."""

UNSEEN = ("eval", "exec", "globals", "locals", "open", "input", "__import__")
"""Builtins through which a function reaches what its code does not name."""

NOT_PART_OF_A_CLASS = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__type_params__"),
    *("__slotnames__", "__dataclass_params__", "__match_args__", "__parameters__", "__orig_bases__"),
    *("__abstractmethods__", "__abstractvars__", "__abstractclassvars__", "_abc_impl"),
}

_WRAPPERS: tuple[Any, ...] = (type(jax.jit(lambda: None)), type(functools.cache(lambda: None)))
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_BUILTIN_METHODS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType, *_SLOTS)
_BETWEEN = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "NOT_TAKEN")


class CannotDescribe(Exception):
    """Something that a function refers to has no state that can be described."""


def describe(value: Any) -> str:
    """A function or object in a word, with a digest that changes when what it computes does.

    **Raises:** `CannotDescribe` where that is not known.
    """
    if isinstance(value, Described):
        return value.identity
    name = next((name for name, function in ACTIVATIONS.items() if function is value), None) or _library_name(value)
    if name is not None:
        return name
    description = _Description()
    try:
        description.add(value)
    except RecursionError:
        raise CannotDescribe("objects nested too deeply") from None
    word = getattr(value, "__qualname__", None) or type(value).__qualname__
    python = f", Python {sys.version_info.major}.{sys.version_info.minor}" if description.bytecode else ""
    return f"{word} ({description.digest()}{python})"


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
    """A function as it was when it was described: JAX compiles it anew where it has come to compute something else."""

    function: Callable[..., Any]
    identity: str

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        return self.function(*arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Described) and (other.function is self.function) and other.identity == self.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def described(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its description; the function itself where a name says it all, or where there is none."""
    if _library_name(function) is not None:
        return function
    try:
        return Described(function, describe(function))
    except CannotDescribe:
        return function


class _Description:
    """The digest of an object, fed by a walk through all that it refers to."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no address is used twice
        self._path: list[str] = []
        self.bytecode = False

    def digest(self) -> str:
        """A short digest of what was added."""
        return self._total.hexdigest()[:16]

    def add(self, value: Any) -> None:
        """Add an object and what it refers to."""
        if value is None or isinstance(value, types.EllipsisType | types.NotImplementedType):
            self._put("constant", repr(value))
        elif type(value) in (bool, int, str):
            self._put(type(value).__name__, repr(value))
        elif type(value) is float:
            self._put("float", struct.pack("<d", value))
        elif type(value) is complex:
            self._put("complex", struct.pack("<dd", value.real, value.imag))
        elif type(value) is bytes:
            self._put("bytes", value)
        elif isinstance(value, jax.core.Tracer):
            raise self._unknown("a traced value")
        elif isinstance(value, jax.Array) or type(value) is np.ndarray or isinstance(value, np.generic):
            self._array(value)
        elif type(value) in (tuple, list):
            self._once(value, self._sequence) if type(value) is list else self._sequence(value)
        elif type(value) in (set, frozenset):
            self._set(value)
        elif type(value) in (dict, types.MappingProxyType):
            self._once(value, self._dictionary)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.ModuleType):
            self._module(value)
        elif (name := _library_name(value)) is not None:
            self._put("name", name)
        elif isinstance(value, types.MethodType):
            self._part("method", "__func__", value.__func__)
            self._part("self", "__self__", value.__self__)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            if isinstance(value.__self__, types.ModuleType):
                raise self._unknown(f"the compiled function {value.__name__} of {value.__self__.__name__}")
            self._put("method", value.__name__)
            self._part("self", "__self__", value.__self__)
        elif isinstance(value, _BUILTIN_METHODS):
            self._put("method", value.__name__)
            self._part("class", "__objclass__", value.__objclass__)
        elif isinstance(value, _WRAPPERS):
            self._part("wrapped", "__wrapped__", value.__wrapped__)
        elif isinstance(value, staticmethod | classmethod):
            self._part(type(value).__name__, "__func__", value.__func__)
        elif isinstance(value, property):
            self._put("property", "")
            self._sequence((value.fget, value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            self._part("cached_property", "func", value.func)
        elif isinstance(value, types.FunctionType):
            self._once(value, self._function)
        elif isinstance(value, type):
            self._once(value, self._class)
        else:
            self._once(value, self._instance)

    def _put(self, kind: str, content: str | bytes) -> None:
        content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        self._total.update(f"{kind} {len(content)} ".encode())
        self._total.update(content)

    def _part(self, kind: str, name: str, value: Any) -> None:
        """A part of an object, and its name for the case that it cannot be described."""
        self._put(kind, name)
        self._path.append(name)
        self.add(value)
        self._path.pop()

    def _unknown(self, what: str) -> CannotDescribe:
        return CannotDescribe(f"{what}, by way of {' → '.join(self._path)}" if self._path else what)

    def _once(self, value: Any, add: Callable[[Any], None]) -> None:
        """What was met before is a reference to it: objects may refer to themselves."""
        if id(value) in self._met:
            self._put("again", str(self._met[id(value)]))
            return
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        add(value)

    def _array(self, value: Any) -> None:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            self._put("key", str(jax.random.key_impl(value)))
            value = jax.random.key_data(value)
        try:
            array = np.asarray(value)
        except Exception as error:
            raise self._unknown(f"an array whose numbers are out of reach ({error})") from None
        self._put("array", f"{array.dtype.descr if array.dtype.names else array.dtype} {array.shape}")
        if array.dtype.hasobject:
            self._sequence(array.ravel().tolist())
        else:
            self._put("bytes", np.ascontiguousarray(array).tobytes())

    def _sequence(self, values: Any) -> None:
        self._put(type(values).__name__, str(len(values)))
        for position, value in enumerate(values):
            self._part("item", str(position), value)

    def _set(self, values: Any) -> None:
        self._put(type(values).__name__, str(len(values)))
        digests = []
        for value in values:
            one = _Description()
            one._path = self._path
            one.add(value)
            digests.append(one._total.hexdigest())
            self.bytecode |= one.bytecode
        self._put("items", " ".join(sorted(digests)))

    def _dictionary(self, values: Mapping[Any, Any]) -> None:
        self._put("dict", str(len(values)))
        for key, value in values.items():
            self.add(key)
            self._part("value", str(key), value)

    def _named(self, values: Mapping[str, Any]) -> None:
        self._put("names", str(len(values)))
        for name in sorted(values):
            self._part("name", name, values[name])

    def _module(self, module: types.ModuleType) -> None:
        library = _library(module.__name__)
        if library is None:
            raise self._unknown(f"the module {module.__name__} as a whole")
        self._put("module", f"{module.__name__} {library}")

    def _function(self, function: types.FunctionType) -> None:
        self._put("function", "")
        self._code(function.__code__)
        self._part("defaults", "default arguments", function.__defaults__)
        self._part("defaults", "default arguments", function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._cell(name, cell)
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        self._named(attributes)
        if _library(function.__globals__.get("__name__", "")) is None:  # what a library does inside is its version
            for names in _globals_of(function.__code__):
                self._global(names, function.__globals__)

    def _cell(self, name: str, cell: types.CellType) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            self._put("empty", name)
        else:
            self._part("closure", name, value)

    def _global(self, names: list[str], scope: dict[str, Any]) -> None:
        """A global value that code loads, with the attributes that it reads of it where it is a module."""
        first, *attributes = names
        if first not in scope:
            if first in UNSEEN:
                raise self._unknown(f"{first}(), which reaches more than the code says")
            self._put("builtin" if hasattr(builtins, first) else "undefined", first)
            return
        value, path = scope[first], first
        while isinstance(value, types.ModuleType) and attributes:
            if not hasattr(value, attributes[0]):
                break
            path = f"{path}.{attributes[0]}"
            value = getattr(value, attributes.pop(0))
        self._part("global", path, value)

    def _code(self, code: types.CodeType) -> None:
        self.bytecode = True
        arguments = code.co_argcount + code.co_kwonlyargcount
        self._put("code", code.co_code)
        self._put("exceptions", code.co_exceptiontable)
        self._put("flags", str((code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)))
        names = (code.co_names, code.co_varnames[:arguments], code.co_cellvars, code.co_freevars)
        self._put("names", " / ".join(map(" ".join, names)))
        self._sequence(code.co_consts)
        for module in _imports_of(code):
            if _library(module) is None:
                raise self._unknown(f"an import of {module} inside a function (import it at the top of the file)")

    def _class(self, cls: type) -> None:
        self._put("class", cls.__name__)
        self._part("class", type(cls).__name__, type(cls))
        self._sequence(cls.__bases__)
        content = {name: value for name, value in vars(cls).items() if name not in NOT_PART_OF_A_CLASS}
        fields = content.pop("__dataclass_fields__", {})
        self._named({name: value for name, value in content.items() if not isinstance(value, _SLOTS)})
        for name, field in fields.items():
            self._part("field", name, (field.default, field.default_factory, field.init, dict(field.metadata)))

    def _instance(self, value: Any) -> None:
        cls = type(value)
        self._part("instance", cls.__qualname__, cls)
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:
            raise self._unknown(f"an object of the class {cls.__qualname__}") from None
        if isinstance(reduced, str):
            raise self._unknown(f"an object of the class {cls.__qualname__}, known by the name {reduced} only")
        make, arguments, *rest = reduced
        self._part("made by", cls.__qualname__, make)
        self._sequence(arguments)
        state, items, pairs = (*rest, None, None, None)[:3]
        # What a class says of its own state may leave something out.
        for part in (state, getattr(value, "__dict__", None)) if _library(cls.__module__) is None else (state,):
            names = part if isinstance(part, dict) else {}
            kept = {name: one for name, one in names.items() if not _is_cached_property(cls, name)}
            if all(isinstance(name, str) for name in kept) and isinstance(part, dict):
                self._named(kept)
            else:
                self.add(part)
        self._sequence(list(items or ()))
        self._sequence([one for pair in pairs or () for one in pair])


def _globals_of(code: types.CodeType) -> Iterator[list[str]]:
    """The names of global values that code and the functions in it load, each with the attributes read of it at once."""
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _BETWEEN]
    for position, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            names = [instruction.argval]
            for attribute in instructions[position + 1 :]:
                if attribute.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                names.append(attribute.argval)
            yield names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _imports_of(code: types.CodeType) -> Iterator[str]:
    """The modules that code imports; a relative one begins with a dot, and is not in a library."""
    loaded: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level = loaded[-2] if len(loaded) > 1 and isinstance(loaded[-2], int) else 0
            yield "." * level + instruction.argval
        elif instruction.opname.startswith("LOAD_"):
            loaded.append(instruction.argval)


def _is_cached_property(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


def _library_name(value: Any) -> str | None:
    """The name under which a library hands out an object, if one does."""
    places: list[Any] = [getattr(value, "__module__", None)]
    name: Any = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if isinstance(value, np.ufunc):
        places, name = ["numpy", "scipy.special"], value.__name__
    for place in places:
        if isinstance(place, str) and isinstance(name, str) and (library := _library(place)) is not None:
            found: Any = sys.modules.get(place)
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is value:
                return f"{MOVED.get(place, place)}.{name}{library}"
    return None


@functools.cache
def _library(module: str) -> str | None:
    """An empty string, or the version in brackets, for a module of an installed library; None for a user's own code."""
    root = module.partition(".")[0]
    if root in NAMED or root == "builtins":
        return ""
    try:
        found = importlib.util.find_spec(root) if root else None
    except (ValueError, ImportError):
        found = None
    if found is None:
        return None
    if root in sys.stdlib_module_names:
        if found.origin in ("built-in", "frozen", None):
            return ""
        place = Path(found.origin)
        return "" if place.is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in place.parts else None
    for name in importlib.metadata.packages_distributions().get(root, ()):
        distribution = importlib.metadata.distribution(name)
        installed = Path(str(distribution.locate_file("")))
        editable = distribution.read_text("direct_url.json") is not None  # from a folder or a repository
        if found.origin and Path(found.origin).is_relative_to(installed) and not editable:
            return f" ({name} {distribution.version})"
    return None
