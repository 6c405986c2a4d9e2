"""Results of a sweep in a Zarr store on disk, which survives any end of the program."""

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from .. import _check
from .describe import FORMAT, differences, versions
from .grid import Block, size
from .problem import FAILED, AbstractProblem, fill_value
from .results import STATUS, assemble, attributes_of, dims, labels, provenance

if TYPE_CHECKING:
    import xarray as xr

SPECIFICATION = "saddlejax_sweep"
FORMAT_NAME = "saddlejax_sweep_format"
GROWING = "saddlejax_sweep_is_being_extended"


class ZarrStore:
    """Results in a folder, in Zarr's format, readable with `xarray.open_zarr` at any moment.

    Every block is one file for each variable, with a checksum, put in place by renaming; `status` comes last. A block
    counts as done where all its files are there and sound, and none of its lanes failed. A store of a grid that is the
    beginning of the one asked for is extended.
    """

    def __init__(self, path: str | Path, problem: AbstractProblem, block_shape: Sequence[int]):
        self.path, self.problem = Path(path), problem
        self.specification = json.loads(json.dumps(problem.specification()))
        if not self.path.exists():
            self._create(block_shape)
        self.attributes = self._check_specification()
        if self.attributes.pop(GROWING, False):
            self._grow()
        with zarr.config.set({"array.write_empty_chunks": True}):  # a block of NaN is a file as well
            self.arrays = {name: self._open(name) for name in (*problem.outputs, STATUS)}
        self.block_shape = tuple(self.arrays[STATUS].chunks)

    def _open(self, name: str) -> zarr.Array:
        try:
            return zarr.open_array(self.path / name, mode="r+")
        except PermissionError:
            raise
        except Exception as error:
            raise ValueError(
                f"store must be whole, but {self.path / name} is missing or damaged ({error}). Restore that folder, or "
                "choose another store."
            ) from error

    def _create(self, block_shape: Sequence[int]) -> None:
        """Make the store complete but for its blocks under another name, then rename it."""
        new = self.path.with_name(f".{self.path.name}.new")
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.parent.mkdir(parents=True, exist_ok=True)
            self._lay_out(new, tuple(block_shape))
            new.rename(self.path)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"store cannot be created: {error.strerror or error}. Choose a folder that can be written",
                str(self.path),
            ) from error

    def _lay_out(self, path: Path, block_shape: tuple[int, ...]) -> None:
        problem, grid = self.problem, self.problem.grid
        attributes: dict[str, Any] = {
            **provenance(problem),
            SPECIFICATION: self.specification,
            FORMAT_NAME: FORMAT,
        }
        group = zarr.create_group(path, attributes=attributes)
        for axis in grid.axes:
            names = labels(axis)
            array = group.create_array(
                axis.name,
                shape=names.shape,
                dtype=_storable(names),
                dimension_names=(axis.name,),
                attributes={"long_name": axis.meaning},
            )
            array[:] = names
        compressors = (ZstdCodec(level=3), Crc32cCodec())
        for name, output in problem.outputs.items():
            group.create_array(
                name,
                shape=(*grid.shape, *output.shape),
                chunks=(*block_shape, *(max(1, n) for n in output.shape)),
                dtype=output.dtype,
                fill_value=fill_value(output.dtype),
                compressors=compressors,
                dimension_names=dims(grid, name, output.variable.dims, output.shape),
                attributes=attributes_of(output.variable),
            )
        group.create_array(
            STATUS,
            shape=grid.shape,
            chunks=block_shape,
            dtype=str,
            fill_value="",
            compressors=compressors,
            dimension_names=grid.dims,
            attributes={"long_name": "outcome; empty where not computed yet"},
        )
        _consolidate(path)

    def _check_specification(self) -> dict[str, Any]:
        try:
            group = zarr.open_group(self.path, mode="r+", zarr_format=3)
            attributes = dict(group.attrs)
            stored = attributes.pop(SPECIFICATION)
        except PermissionError:
            raise
        except Exception as error:
            raise ValueError(
                f"store must be a new folder or one that a sweep wrote, but {self.path} is neither, or its zarr.json is "
                f"damaged ({error}). Choose another store."
            ) from error
        if attributes.pop(FORMAT_NAME, None) != FORMAT:
            raise ValueError(
                f"store must tell functions apart by what they compute, but {self.path} was written by saddlejax "
                f"{attributes.get('saddlejax')}, whose stores do so in another way. Read it with xarray.open_zarr, and "
                "choose another store for the sweep."
            )
        differing = differences(stored, self.specification)
        if differing and _begins(stored, self.specification):
            self._check_room()
            attributes[GROWING] = True
            group.attrs.update({SPECIFICATION: self.specification, GROWING: True})
        elif differing:
            lines = "\n".join(f"  {line}" for line in differing)
            raise ValueError(
                f"store must hold the sweep asked for, but {self.path} holds another. What differs:\n{lines}\n"
                "Choose another store for the new sweep. (A store can be extended by values at the ends of its lists.)"
            )
        now = versions()
        names = [name for name in now if name in attributes]
        changed = [
            f"{name} {attributes[name]} then, {now[name]} now" for name in names if attributes[name] != now[name]
        ]
        if changed:
            _check.warn(f"{self.path} was begun with other versions: {'; '.join(changed)}.")
        return attributes

    def _check_room(self) -> None:
        """Refuse to extend a store where a lane would have measurements of another shape."""
        for name, output in self.problem.outputs.items():
            array = self._open(name)
            shape = array.shape[len(self.problem.grid.axes) :]
            if shape != output.shape or array.dtype != np.dtype(output.dtype):
                raise ValueError(
                    f"store can be extended only where the measurements of a lane keep their shapes, but {name} has "
                    f"{shape} and {array.dtype} in {self.path} and would have {output.shape} and {output.dtype}: deeper "
                    "networks have more layers. Choose another store for the larger sweep."
                )

    def _grow(self) -> None:
        """Make room for the grid asked for; after an interruption the next call does it again."""
        grid = self.problem.grid
        for axis in grid.axes:
            array, names = self._open(axis.name), labels(axis)
            array.resize(names.shape)
            array[:] = names
        for name in (*self.problem.outputs, STATUS):
            array = self._open(name)
            array.resize((*grid.shape, *array.shape[len(grid.axes) :]))
        _consolidate(self.path)
        group = zarr.open_group(self.path, mode="r+", zarr_format=3)
        del group.attrs[GROWING]

    def missing(self) -> list[Block]:
        """The blocks yet to compute, damaged ones and ones with failed lanes among them."""
        damaged: list[Block] = []
        missing = [block for block in self.problem.grid.blocks(self.block_shape) if not self._done(block, damaged)]
        if damaged:
            places = ", ".join(str(self._file(STATUS, block).relative_to(self.path)) for block in damaged[:5])
            _check.warn(
                f"{self.path} holds damaged blocks, {len(damaged)} in number, which are computed again: those of {places}"
                f"{', …' if len(damaged) > 5 else '.'}"
            )
        return missing

    def _done(self, block: Block, damaged: list[Block]) -> bool:
        files = [self._file(name, block) for name in (STATUS, *self.problem.outputs)]
        if not files[0].exists():
            return False
        if not all(file.exists() for file in files):
            damaged.append(block)
            return False
        try:
            status = self.arrays[STATUS][block]
            for name in self.problem.outputs:
                self.arrays[name][block]
        except Exception:
            damaged.append(block)
            return False
        return not any(str(one) == "" or str(one).startswith(FAILED) for one in np.ravel(status))

    def _file(self, name: str, block: Block) -> Path:
        array = self.arrays[name]
        position = [part.start // step for part, step in zip(block, self.block_shape, strict=True)]
        return self.path / name / "/".join(["c", *map(str, (*position, *[0] * (array.ndim - len(position))))])

    def write(self, block: Block, values: dict[str, np.ndarray]) -> None:
        """Write a block, its status last."""
        try:
            for name in (*self.problem.outputs, STATUS):
                value = values[name]
                self.arrays[name][block] = value.reshape(*size(block), *value.shape[1:])
        except OSError as error:
            raise type(error)(
                error.errno,
                f"a block of the sweep cannot be written: {error.strerror or error}. What was written before is safe; "
                "make room and call the sweep again to go on",
                str(self.path),
            ) from error

    def dataset(self) -> "xr.Dataset":
        """All results, loaded."""
        values = {name: np.asarray(array[...]) for name, array in self.arrays.items()}
        return assemble(self.problem, values, self.attributes)


def _begins(stored: Any, asked: dict[str, Any]) -> bool:
    """Whether a grid is the beginning of another, and all else the same."""
    before, now = stored.get("grid", {}), asked["grid"]
    alike = {**stored, "grid": None} == {**asked, "grid": None} and list(before) == list(now)
    return alike and all(now[name][: len(before[name])] == before[name] for name in now)


def _consolidate(path: Path) -> None:
    """Gather the metadata of all arrays in one file, where xarray looks for it."""
    with warnings.catch_warnings():  # of Zarr, that its format 3 does not yet specify this
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)


def _storable(names: np.ndarray) -> Any:
    return names.dtype if names.dtype.kind in "biuf" else str
