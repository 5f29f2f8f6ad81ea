"""Packed model files: sparse, shared and few-bit weights only save bytes if they are stored so.

A packed file holds a model file of which some arrays were coded; the file is restored from it bit for bit. Bitmask,
codebook and entropy coding are those of deep compression (Han et al., 2016, arXiv:1510.00149).

Coded are arrays alone of which a tenth or more is zero, or which have few distinct values, and of these what tells
where the values stand, never the values themselves. So dense models in floats or 8 bits gain nothing, and the sizes
of packed models compare with that of the dense one: what they save is what the plan took away.

A file is the header (magic and version, SHA-256 and length of the model file, number of arrays), an entry for each
coded array (offset and length in the model file, kind, length of its code), the model file without those arrays, and
their codes in the same order. Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from paretune.errors import ParetuneError

PACKED = ".packed"
"""Added to the name of a model file for its packed form."""

MAX_EXPANSION = 1000
"""No packed file is restored to more than so many times its length; `pack` fills it up with zeros where it would be."""

_MAGIC, _VERSION = b"paretune", 1
_HEADER = struct.Struct("<8sH32sQI")
_ENTRY = struct.Struct("<QQBQ")
_STREAM = struct.Struct("<BQ")

_SPARSE = 0.1
"""Share of zeros from which an array counts as sparse."""

_MASKED, _SIGNED, _CODEBOOK = 1, 2, 4
"""Parts of a code: the mask of nonzeros, the signs of the zeros, and indices in a codebook in place of values."""

_PLAIN, _DEFLATED, _DEFLATED_BYTES = range(3)
"""How a stream of indices is stored: packed to bits; these deflated; one byte for each index, deflated."""

_CHUNK = 1 << 20
"""Indices that are packed to bits at once; a multiple of 8."""

_SAMPLE = 1 << 16
"""Bytes of a stream that tell how to deflate it."""

Array = NDArray[Any]


class _Kind(NamedTuple):
    """Numbers that are coded, as unsigned words of their bits.

    Attributes:
        word: The words' type.
        is_float: Whether the highest bit is a sign, so that there are two zeros.
        levels: An array counts as one of few values up to so many distinct ones. Integers of 7 bits have more than
            64, as 8-bit quantization always gives them.
    """

    word: str
    is_float: bool
    levels: int


_KINDS = (_Kind("<u4", True, 256), _Kind("<u2", True, 256), _Kind("<u1", False, 64))
_ONNX_KINDS = {1: 0, 10: 1, 16: 1, 2: 2, 3: 2}
"""FLOAT, FLOAT16, BFLOAT16, UINT8 and INT8 of onnx.TensorProto."""
_SAFETENSORS_KINDS = {"F32": 0, "F16": 1, "BF16": 1, "U8": 2, "I8": 2}


class _Run(NamedTuple):
    """An array's bytes in the model file."""

    offset: int
    length: int
    kind: int


def pack(model_file: Path, packed: Path) -> None:
    """Write a model file with its sparse and few-valued arrays coded.

    Args:
        model_file: ``.onnx`` (without external data) or ``.safetensors``.
        packed: Where the packed file goes.

    Raises:
        ParetuneError: The model file is of another kind.
    """
    data = model_file.read_bytes()
    coded: list[tuple[_Run, bytes]] = []
    for run in _runs(model_file, data):
        code = _encode(np.frombuffer(data, _KINDS[run.kind].word, _count(run), run.offset), _KINDS[run.kind])
        if code is not None and len(code) + _ENTRY.size < run.length:
            coded.append((run, code))
    parts = [_HEADER.pack(_MAGIC, _VERSION, hashlib.sha256(data).digest(), len(data), len(coded))]
    parts += [_ENTRY.pack(*run, len(code)) for run, code in coded]
    parts += [data[start:stop] for start, stop in _gaps([run for run, _ in coded], len(data))]
    parts += [code for _, code in coded]
    missing = -(-len(data) // MAX_EXPANSION) - sum(len(part) for part in parts)
    with packed.open("wb") as file:
        file.writelines([*parts, bytes(max(0, missing))])


def unpack(packed: Path, model_file: Path) -> None:
    """Restore the model file, bit for bit.

    Args:
        packed: What `pack` wrote. It may come from anywhere: whatever it claims, no more memory is taken than a small
            multiple of the model file, which is at most `MAX_EXPANSION` times as long.
        model_file: Where the model file goes; written only when all of it was restored.

    Raises:
        ParetuneError: The packed file is torn, was altered, or is of another version.
    """
    try:
        data = _unpack(memoryview(packed.read_bytes()))
    except _BrokenError as error:
        raise ParetuneError(
            f"{packed} must be a whole and unaltered packed model file of version {_VERSION}, but got one {error}; "
            "pack the model file again"
        ) from error
    model_file.write_bytes(data)


class _BrokenError(Exception):
    """A packed file isn't what it should be; the message says how, as a phrase that follows "one"."""


def _unpack(packed: memoryview) -> memoryview:
    reader = _Reader(packed)
    magic, version, digest, size, count = reader.unpack(_HEADER)
    if magic != _MAGIC:
        raise _BrokenError("that doesn't begin as packed files do")
    if version != _VERSION:
        raise _BrokenError(f"of version {version}")
    if size > MAX_EXPANSION * len(packed):
        raise _BrokenError(f"of {len(packed)} bytes that is to become {size}")
    entries = []
    for _ in range(count):
        *numbers, length = reader.unpack(_ENTRY)
        entries.append((_Run(*numbers), length))
    _check_runs([run for run, _ in entries], size)
    data = np.zeros(size, np.uint8)
    for start, stop in _gaps([run for run, _ in entries], size):
        data[start:stop] = np.frombuffer(reader.take(stop - start), np.uint8)
    for run, length in entries:
        words = _decode(_Reader(reader.take(length)), _count(run), _KINDS[run.kind])
        data[run.offset : run.offset + run.length] = words.view(np.uint8)
    if any(reader.rest()):
        raise _BrokenError("with bytes beyond its end")
    if hashlib.sha256(data.data).digest() != digest:
        raise _BrokenError("from which something else comes than was packed")
    return data.data


def _check_runs(runs: list[_Run], size: int) -> None:
    end = 0
    for run in runs:
        if run.kind >= len(_KINDS) or run.length % np.dtype(_KINDS[run.kind].word).itemsize:
            raise _BrokenError("with an array of an unknown kind")
        if run.offset < end:
            raise _BrokenError("whose arrays overlap")
        end = run.offset + run.length
    if end > size:
        raise _BrokenError("whose arrays go beyond the model file")


def _gaps(runs: list[_Run], size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what lies between the arrays."""
    start = 0
    for run in runs:
        yield start, run.offset
        start = run.offset + run.length
    yield start, size


def _count(run: _Run) -> int:
    return run.length // np.dtype(_KINDS[run.kind].word).itemsize


class _Reader:
    """Takes bytes off the front, never more than there are."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, length: int) -> memoryview:
        if length > len(self._data):
            raise _BrokenError("that ends too early")
        taken, self._data = self._data[:length], self._data[length:]
        return taken

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def array(self, word: str, count: int) -> Array:
        return np.frombuffer(self.take(count * np.dtype(word).itemsize), word)

    def rest(self) -> memoryview:
        return self.take(len(self._data))


# --- where a model file has its arrays ---


def _runs(model_file: Path, data: bytes) -> Iterator[_Run]:
    """The arrays of a model file that can be coded, by offset, none overlapping."""
    if model_file.suffix == ".safetensors":
        return _safetensors_runs(data)
    if model_file.suffix == ".onnx":
        return _onnx_runs(data)
    raise ParetuneError(
        f"a model file to be packed must be .onnx or .safetensors, but got {model_file}; keep it as it is"
    )


def _safetensors_runs(data: bytes) -> Iterator[_Run]:
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        if entry["dtype"] in _SAFETENSORS_KINDS:
            yield _Run(8 + length + start, stop - start, _SAFETENSORS_KINDS[entry["dtype"]])


def _onnx_runs(data: bytes) -> Iterator[_Run]:
    graph = onnx.load_model_from_string(data).graph
    end = 0
    # A file has its fields in this order. An array that isn't found where it should be is left as it is, and equal
    # bytes before it would serve as well: what is coded are bytes, whatever they mean.
    constants = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*constants, *graph.initializer):
        if tensor.data_type in _ONNX_KINDS and tensor.raw_data:
            start = data.find(tensor.raw_data, end)
            if start >= 0:
                end = start + len(tensor.raw_data)
                yield _Run(start, len(tensor.raw_data), _ONNX_KINDS[tensor.data_type])


# --- coding of one array ---


def _encode(words: Array, kind: _Kind) -> bytes | None:
    """The shortest code of an array; None where it is neither sparse nor few-valued."""
    nonzero = words << 1 != 0 if kind.is_float else words != 0
    is_sparse = len(words) > 0 and np.count_nonzero(nonzero) <= (1 - _SPARSE) * len(words)
    values = words[nonzero] if is_sparse else words
    codebook = _codebook(values, kind.levels)
    if codebook is None and not is_sparse:
        return None
    found = []
    if is_sparse:
        mask = _mask(words, nonzero, kind)
        found.append(_join(mask, values, None))
        if codebook is not None:
            found.append(_join(mask, values, codebook))
            codebook = _codebook(words, kind.levels)
    if codebook is not None:
        found.append(_join((0, b""), words, codebook))
    return min(found, key=len)


def _mask(words: Array, nonzero: NDArray[np.bool_], kind: _Kind) -> tuple[int, bytes]:
    """Flags and bytes of the part that tells where the zeros are, and which of them are negative."""
    streams, zeros = _write(nonzero.view(np.uint8), 1), words[~nonzero]
    if kind.is_float and zeros.any():
        return _MASKED | _SIGNED, streams + _write((zeros != 0).view(np.uint8), 1)
    return _MASKED, streams


def _join(mask: tuple[int, bytes], values: Array, codebook: Array | None) -> bytes:
    flags, streams = mask
    if codebook is None:
        return bytes([flags]) + streams + values.tobytes()
    indices = np.searchsorted(codebook, values).astype(np.uint8)
    parts = [bytes([flags | _CODEBOOK]), streams, bytes([len(codebook) - 1]), codebook.tobytes()]
    return b"".join([*parts, _write(indices, _bits(len(codebook)))])


def _decode(reader: _Reader, count: int, kind: _Kind) -> Array:
    (flags,) = reader.take(1)
    if flags > _MASKED | _SIGNED | _CODEBOOK:
        raise _BrokenError("with an array in an unknown code")
    nonzero = _read(reader, count, 1) != 0 if flags & _MASKED else np.ones(count, np.bool_)
    words = np.zeros(count, kind.word)
    filled = int(np.count_nonzero(nonzero))
    if flags & _SIGNED:
        sign = 1 << 8 * words.itemsize - 1
        words[~nonzero] = _read(reader, count - filled, 1) * words.dtype.type(sign)
    if flags & _CODEBOOK:
        levels = reader.take(1)[0] + 1
        codebook = reader.array(kind.word, levels)
        indices = _read(reader, filled, _bits(levels))
        if indices.max(initial=0) >= levels:
            raise _BrokenError("with an index beyond its codebook")
        words[nonzero] = codebook[indices]
    else:
        words[nonzero] = reader.array(kind.word, filled)
    if reader.rest():
        raise _BrokenError("with a code that is too long")
    return words


def _codebook(words: Array, levels: int) -> Array | None:
    """The distinct words, ascending; None where there are none or more than `levels`."""
    if not len(words):
        return None
    few = np.unique(words[: 16 * levels])  # most arrays show here already that they have more
    if len(few) > levels:
        return None
    found: Array = np.unique(words) if words.itemsize > 1 else np.flatnonzero(np.bincount(words)).astype(words.dtype)
    return found if len(found) <= levels else None


def _bits(levels: int) -> int:
    """Bits of an index in a codebook, at least 1."""
    return max(1, (levels - 1).bit_length())


# --- streams of small numbers ---


def _write(numbers: NDArray[np.uint8], bits: int) -> bytes:
    """Numbers below 2**bits as the shortest stream."""
    chunks = range(0, len(numbers), _CHUNK)
    plain = b"".join(_to_bits(numbers[start : start + _CHUNK], bits).tobytes() for start in chunks)
    # Looking for repetitions takes four times as long, and pays only where there is a pattern, which shows early.
    strategies = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
    strategy = min(strategies, key=lambda strategy: len(_deflate(plain[:_SAMPLE], strategy)))
    streams = [(_PLAIN, plain), (_DEFLATED, _deflate(plain, strategy))]
    if 8 % bits:  # bytes across whose borders numbers lie tell nothing of how often each occurs
        streams.append((_DEFLATED_BYTES, _deflate(numbers.tobytes(), zlib.Z_HUFFMAN_ONLY)))
    form, data = min(streams, key=lambda stream: len(stream[1]))
    return _STREAM.pack(form, len(data)) + data


def _read(reader: _Reader, count: int, bits: int) -> NDArray[np.uint8]:
    form, length = reader.unpack(_STREAM)
    data, plain = reader.take(length), -(-count * bits // 8)
    if form == _DEFLATED_BYTES:
        return np.frombuffer(_inflate(data, count), np.uint8)
    if form == _DEFLATED:
        data = memoryview(_inflate(data, plain))
    if form > _DEFLATED_BYTES or len(data) != plain:
        raise _BrokenError("with a stream that is torn")
    # A chunk of a multiple of 8 numbers ends with a byte.
    starts, packed = range(0, count, _CHUNK), np.frombuffer(data, np.uint8)
    chunks = [_from_bits(packed[start * bits // 8 :], min(_CHUNK, count - start), bits) for start in starts]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)


def _to_bits(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    digits = numbers if bits == 1 else np.unpackbits(numbers[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(digits)


def _from_bits(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    digits = np.zeros((count, 8), np.uint8)
    digits[:, 8 - bits :] = np.unpackbits(packed[: -(-count * bits // 8)], count=count * bits).reshape(count, bits)
    return np.packbits(digits)


def _deflate(data: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS, memLevel=9, strategy=strategy)
    return compressor.compress(data) + compressor.flush()


def _inflate(data: memoryview, length: int) -> bytes:
    """Undo `_deflate`; never makes more than `length` bytes."""
    decompressor = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        found = decompressor.decompress(data, length + 1)
    except zlib.error as error:
        raise _BrokenError(f"with a stream that is torn ({error})") from error
    if len(found) != length or not decompressor.eof or decompressor.unused_data:
        raise _BrokenError("with a stream that is torn")
    return found
