"""Nearest vectors by inner product, on [faiss](https://github.com/facebookresearch/faiss): build, store, search."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import require

STRUCTURES = ("flat", "hnsw", "ivfpq")
DTYPES = {"float16": "SQfp16", "float32": "Flat"}

MIN_IVFPQ = 256
"""Minimum number of vectors for product quantization: one per centroid, of which a byte can name 256."""

_SAMPLES_PER_LIST = 64
_EFFORT = {"nprobe": 64, "efSearch": 128}


def _faiss() -> Any:
    return require("faiss", "Dense search", "dense")


def check_structure(structure: str, dtype: str) -> None:
    """Checks the settings of [`build_faiss_index`], and that faiss is installed."""
    if dtype not in DTYPES:
        raise ValueError(f"got dtype={dtype!r}, expected one of {', '.join(DTYPES)}.")
    if structure not in STRUCTURES:
        raise ValueError(f"got structure={structure!r}, expected one of {', '.join(STRUCTURES)}.")
    _faiss()


def build_faiss_index(shards: Sequence[Path], number: int, dimension: int, structure: str, dtype: str) -> Any:
    """
    Builds a faiss index of the `number` vectors in the rows of `.npy` files.

    - `flat` compares a query with every vector: exact, for up to about a million passages, or when exactness matters
      more than time.
    - `hnsw` follows a graph of neighbors: a hundred times as fast and nearly exact, with 270 more bytes per vector.
    - `ivfpq` groups at least `MIN_IVFPQ` vectors in cells, with one byte per eight numbers, whatever the `dtype`: for
      tens of millions, at some loss.
    """
    faiss = _faiss()
    code = DTYPES[dtype]
    factory = code if structure == "flat" else f"HNSW32_{code}"
    if structure == "ivfpq":
        factory = f"IVF{number_of_cells(number)},PQ{bytes_per_vector(dimension)}"
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    if structure == "hnsw":
        index.hnsw.efConstruction = 200
    if not index.is_trained or structure == "ivfpq":
        for clustering in (index.cp, index.pq.cp) if structure == "ivfpq" else ():
            clustering.min_points_per_centroid = 1  # else faiss warns on standard error
            clustering.seed = 0
        index.train(_sample(shards, min(number, _SAMPLES_PER_LIST * max(256, number_of_cells(number)))))
    if structure == "flat":  # reserve the memory: growing would need twice as much
        index.codes.resize(number * index.code_size)
        index.codes.clear()
    for shard in shards:
        index.add(np.load(shard).astype(np.float32))
    set_effort(index)
    return index


def number_of_cells(number: int) -> int:
    """Number of cells of `ivfpq`: the power of two closest to 4 √n, but no more than one per 39 vectors."""
    return max(1, min(2 ** round(math.log2(4 * math.sqrt(number))), number // 39))


def bytes_per_vector(dimension: int) -> int:
    """Bytes per vector of `ivfpq`: one per eight numbers, or per more numbers if eight do not divide the dimension."""
    return max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)


def _sample(shards: Sequence[Path], number: int) -> NDArray[np.float32]:
    """About `number` random vectors, from each file in proportion to its size."""
    sizes = [len(np.load(shard, mmap_mode="r")) for shard in shards]
    share, random = number / sum(sizes), np.random.default_rng(0)
    parts = []
    for shard, size in zip(shards, sizes, strict=True):
        rows = np.sort(random.choice(size, min(size, math.ceil(size * share)), replace=False))
        parts.append(np.load(shard, mmap_mode="r")[rows].astype(np.float32))
    return np.concatenate(parts)


def set_effort(index: Any, effort: int | None = None) -> None:
    """Sets how many cells (`ivfpq`) or candidates (`hnsw`) a query visits: more are slower and more exact."""
    faiss = _faiss()
    name = {"IndexIVFPQ": "nprobe", "IndexHNSWSQ": "efSearch", "IndexHNSWFlat": "efSearch"}.get(type(index).__name__)
    if name is not None:
        faiss.ParameterSpace().set_index_parameter(index, name, _EFFORT[name] if effort is None else effort)


def write_faiss_index(index: Any, path: Path) -> None:
    """Writes a faiss index to a file."""
    _faiss().write_index(index, str(path))


def read_faiss_index(path: Path, mmap: bool) -> Any:
    """Reads a faiss index, memory-mapped if `mmap` is set. Raises a `ValueError` if the file is damaged."""
    faiss = _faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[-1]}). Build the index again.") from error


def nearest(index: Any, queries: NDArray[np.float32], k: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Rows and inner products of the up to `k` nearest vectors of each query, nearest first."""
    products, rows = index.search(queries, min(k, index.ntotal))
    return [(row[row >= 0], product[row >= 0]) for row, product in zip(rows, products, strict=True)]
