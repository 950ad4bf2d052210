"""Reading a scipy sparse matrix out of a pickle without running what the pickle asks for.

A pickle is a program: it names functions and calls them. Here the few names that a pickled CSR or CSC matrix
needs stand for small classes of this file, which keep plain integers and bytes; every other name is refused.
Neither numpy's nor scipy's own unpickling is reached, so scipy need not be installed.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from knn_lm_eval.errors import UserError, shortened


@dataclass(frozen=True)
class SparseMatrix:
    """The parts of a compressed sparse matrix, as scipy names them.

    Attributes
    ----------
    by_row : True for CSR (``indptr`` cuts rows), False for CSC (columns).
    shape : rows and columns.
    indptr : integer ``[rows + 1]`` or ``[columns + 1]``, from 0, never falling.
    indices : integer ``[indptr[-1]]``, the column (row) of each element, each less than their number.
    data : bool, integer or float ``[indptr[-1]]``, the elements.
    """

    by_row: bool
    shape: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


def bytes_to_load(path: Path) -> int:
    """The memory that ``load_sparse_matrix`` takes, and what goes through the matrix: about, and rather too much."""
    if not path.is_file():
        return 0  # loading it says so
    with open(path, "rb") as file:
        protocol = file.read(2)
    # Until protocol 3 bytes are written as text, which is there beside the bytes that are made of it.
    copies = 3 if protocol < b"\x80\x03" else 1
    return path.stat().st_size * copies * 5 // 4


def load_sparse_matrix(path: str | Path) -> SparseMatrix:
    """Load the scipy CSR or CSC matrix (or array) that ``path`` holds as a pickle.

    Works for pickles of protocol 2 and later, of any scipy and numpy version.

    Raises
    ------
    UserError
        Where the file cannot be read, holds something else, is damaged, or names anything that a sparse
        matrix of numbers does not need; nothing that it names is imported or called.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            matrix = _Unpickler(_Bounded(file, path.stat().st_size)).load()
    except _RefusedError as refusal:
        raise UserError(
            f"{path} {refusal}, which no sparse matrix of numbers needs; nothing of it was run."
        ) from refusal
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # damage can look like anything
        raise UserError(f"{path} is damaged or not a pickle ({shortened(error, 120)}).") from error
    if not isinstance(matrix, _Sparse):
        raise UserError(f"{path} holds no scipy CSR or CSC matrix but {type(matrix).__name__.strip('_').lower()}.")
    return _checked(path, matrix)


class _Bounded:
    """A file for the unpickler, which believes every length that a pickle says: one beyond the file's end is refused
    before there is memory for it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.readline, self._file, self.size = file.readline, file, size

    def read(self, count: int) -> bytes:
        self.check(count)
        return self._file.read(count)

    def check(self, count: int) -> None:
        """Raise where the file does not have so many bytes to come."""
        if not 0 <= count <= self.size - self._file.tell():
            raise pickle.UnpicklingError(f"a length of {count:,} bytes, beyond the file's end")


class _RefusedError(pickle.UnpicklingError):
    """What the pickle wants and shall not have."""


class _StandIn:
    """What a name in the pickle stands for; pickle's BUILD finds a harmless ``__setstate__`` in each."""

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"wants to set the state of a {type(self).__name__.strip('_').lower()}, which has none")


class _Bytes(_StandIn):
    """``_codecs.encode(text, "latin1")`` and ``bytes()``: how protocol 2 writes bytes."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        if not isinstance(text, str) or encoding != "latin1":
            raise _RefusedError(f"wants to encode {type(text).__name__} as {shortened(encoding, 40)}")
        return text.encode("latin1")


class _Dtype(_StandIn):
    """``numpy.dtype``: of numbers only."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _NUMBERS:
            raise _RefusedError(f"wants to make an array of dtype {shortened(code, 40)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state
        if order not in ("<", ">", "|", "=") or structure[:3] != [None, None, None]:
            raise _RefusedError("wants to make an array of a structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(_StandIn):
    """``numpy.ndarray``, filled by ``__setstate__`` (protocols 2 to 4)."""

    array = np.empty(0, dtype=np.int8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _as_array(data, dtype, shape)


class _Reconstruct(_StandIn):
    """``numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")``: an array to be filled."""

    def __new__(cls, array_class: type, shape: tuple, code: bytes) -> _Array:  # type: ignore[misc]
        if array_class is not _Array:
            raise _RefusedError("wants to make an array of a class that is not numpy.ndarray")
        return _Array()


class _FromBuffer(_StandIn):
    """``numpy.core.numeric._frombuffer(data, dtype, shape, order)``: an array of protocol 5."""

    def __new__(cls, data: bytes, dtype: _Dtype, shape: tuple, *order: Any) -> _Array:  # type: ignore[misc]
        array = _Array()
        array.array = _as_array(data, dtype, shape)
        return array


class _Scalar(_StandIn):
    """``numpy.core.multiarray.scalar(dtype, data)``."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        return _as_array(data, dtype, (1,))[0].item()


class _Sparse(_StandIn):
    """A scipy sparse matrix of compressed rows (or, below, columns): its attributes and nothing else."""

    by_row = True
    attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a sparse matrix without attributes")
        self.attributes = state


class _SparseByColumn(_Sparse):
    by_row = False


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# Old and new homes of the same things.
_ALLOWED: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Bytes,
    ("builtins", "bytes"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
    **{
        (f"scipy.sparse{module}", f"{letter}_{kind}"): stand_in
        for letter, stand_in in (("csr", _Sparse), ("csc", _SparseByColumn))
        for module in ("", f".{letter}", f"._{letter}")
        for kind in ("matrix", "array")
    },
}


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """The standard one in Python: the one in C may allocate any amount of memory for a damaged file."""

    dispatch: dict[int, Any] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file)
        self._size, self._made = file.size, 0

    def _bytearray8(self) -> None:
        """An array of bytes, read before there is room for it."""
        (count,) = struct.unpack("<Q", self.read(8))
        self._spend(count)
        self.append(bytearray(self.read(count)))

    dispatch[pickle.BYTEARRAY8[0]] = _bytearray8

    def _reduce(self) -> None:
        """A call: what calls make of bytes that the file has once is no larger than the file."""
        arguments = self.stack[-1]
        self._spend(sum(len(each) for each in arguments if isinstance(each, str | bytes | bytearray)))
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = _reduce

    def _build(self) -> None:
        """The state of an object, of which the same is true."""
        if isinstance(state := self.stack[-1], tuple):
            self._spend(sum(len(each) for each in state if isinstance(each, bytes | bytearray)))
        super().load_build()

    dispatch[pickle.BUILD[0]] = _build

    def _setitem(self) -> None:
        self._check_names(self.stack[-2:-1])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = _setitem

    def _setitems(self) -> None:
        self._check_names(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = _setitems

    def _dict(self) -> None:
        self._check_names(self.stack[::2])
        super().load_dict()

    dispatch[pickle.DICT[0]] = _dict

    def _set(self) -> None:
        raise _RefusedError("wants to make a set")

    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.FROZENSET[0]] = _set

    def _spend(self, count: int) -> None:
        self._made += count
        if self._made > 4 * self._size:
            raise pickle.UnpicklingError("more bytes than the file has, made of the same ones again and again")

    @staticmethod
    def _check_names(names: list[Any]) -> None:
        """Raise where a dictionary's names are not plain: to look up tuples within tuples can take forever."""
        if not all(isinstance(name, str | int) for name in names):
            raise pickle.UnpicklingError("a dictionary of something else than names")

    def find_class(self, module: str, name: str) -> type:
        if (stand_in := _ALLOWED.get((module, name))) is None:
            wanted = f"{module}.{name}".encode("unicode_escape").decode("ascii")  # may hold anything
            raise _RefusedError(f"wants to load {wanted:.80}")
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("wants to load an object from outside the file")


def _as_array(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int]) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype) or len(shape) != 1:
        raise pickle.UnpicklingError("an array that is not one row of numbers")
    array = np.frombuffer(data, dtype.dtype, count=shape[0])
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _checked(path: Path, matrix: _Sparse) -> SparseMatrix:
    """The matrix with plain arrays; raises UserError where its parts do not fit one another."""
    parts = {name: matrix.attributes.get(name) for name in ("indptr", "indices", "data")}
    shape = matrix.attributes.get("_shape")
    arrays = {name: part.array for name, part in parts.items() if isinstance(part, _Array)}
    if (
        len(arrays) < len(parts)
        or any(arrays[name].dtype.kind not in "iu" for name in ("indptr", "indices"))
        or not isinstance(shape, tuple)
        or len(shape) != 2
        or not all(isinstance(size, int) and size >= 0 for size in shape)
    ):
        raise UserError(f"{path} is damaged: its sparse matrix lacks indptr, indices, data or a shape.")
    indptr, indices, data = arrays["indptr"], arrays["indices"], arrays["data"]
    major, minor = shape if matrix.by_row else shape[::-1]
    if len(indptr) != major + 1 or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
        raise UserError(f"{path} is damaged: its indptr does not fit a matrix of shape {list(shape)}.")
    used = int(indptr[-1])
    if min(len(indices), len(data)) < used:
        raise UserError(f"{path} is damaged: it lacks some of its {used:,} elements.")
    indices = indices[:used]
    if used and not 0 <= indices.min() <= indices.max() < minor:
        raise UserError(f"{path} is damaged: an index lies outside its shape {list(shape)}.")
    return SparseMatrix(matrix.by_row, (shape[0], shape[1]), indptr, indices, data[:used])
