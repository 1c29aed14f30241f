"""Search by meaning: passages as vectors, embedded in shards that an interrupted build finds again."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passages import Corpus, Passage, read_passages
from ..searchable import check_request
from .encoder import Encoder
from .store import check_kind, copy_index, new_index, read_manifest, write_manifest
from .stored import PassageWriter, StoredPassages, with_scores
from .vectors import (
    MIN_IVFPQ,
    check_structure,
    make_index,
    nearest,
    read_vectors,
    set_effort,
    write_vectors,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND, VERSION = "igpo_trl.dense", 1
VECTORS_FILE, PROBE_FILE, SETTINGS_FILE = "vectors.faiss", "probe.npy", "settings.json"

_CHUNK = 1024  # passages between two looks at the progress bar


class DenseIndex:
    """
    Search by the inner product of unit vectors, those of a query and of every passage.

    Scores are cosines, up to the rounding of the stored vectors. The index has its passages and vectors, not the
    model, which is loaded by its name or folder.

    ```python
    >>> index = DenseIndex.build("corpus.jsonl.gz", "index/", model="intfloat/e5-base-v2")
    >>> index = DenseIndex.load("index/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=0.87), …]
    ```
    """

    def __init__(self, vectors: Any, passages: Sequence[Passage], encoder: Encoder, directory: Path) -> None:
        self._vectors = vectors
        self._passages = passages
        self._encoder = encoder
        self._directory = directory

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        directory: str | Path,
        *,
        model: "str | Path | SentenceTransformer",
        structure: str = "flat",
        dtype: str = "float16",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 64,
        shard_size: int = 8192,
        device: str | None = None,
        half: bool = False,
        restart: bool = False,
        show_progress: bool = True,
    ) -> "DenseIndex":
        """
        Embeds a corpus and indexes it on disk.

        The index appears in its directory complete or not at all. An interrupted build, called again with the same
        corpus, model and settings, goes on after the last shard that it has written.

        Args:
            corpus (`str`, `Path`, or iterable of these, of `dict` or of `Passage`):
                As for [`BM25Index.build`].
            directory (`str` or `Path`):
                Where to put the index.
            model (`str`, `Path` or `SentenceTransformer`):
                Name on the hub, a folder, or the model itself.
            structure (`str`, *optional*, defaults to `"flat"`):
                `"flat"`, `"hnsw"` or `"ivfpq"`; see [`make_index`] for when to use which.
            dtype (`str`, *optional*, defaults to `"float16"`):
                Of the stored vectors, `"float16"` or `"float32"`.
            query_prompt, passage_prompt (`str`, *optional*):
                Put before every query and passage; `""` for nothing. By default what the model's own configuration
                says, or `"query: "` and `"passage: "` for e5 models.
            batch_size (`int`, *optional*, defaults to `64`):
                Passages that go through the model together.
            shard_size (`int`, *optional*, defaults to `8192`):
                Passages per shard: what an interruption may cost.
            device (`str`, *optional*):
                Such as `"cuda:1"`; by default a GPU when there is one.
            half (`bool`, *optional*, defaults to `False`):
                Whether the model computes in half precision.
            restart (`bool`, *optional*, defaults to `False`):
                Whether to throw away what an interrupted build has left.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show progress bars.

        Raises:
            FileNotFoundError: A file or folder does not exist.
            FileExistsError: The directory holds something that is no index.
            BlockingIOError: Another process builds this index.
            ValueError: As for [`BM25Index.build`]; or the model gives a vector that is not finite; or what an
                interrupted build has left is of another corpus, model or setting.
        """
        check_structure(structure, dtype)
        if shard_size < 1:
            raise ValueError(f"got shard_size={shard_size}, expected at least 1.")
        passages = read_passages(corpus)
        encoder = Encoder(
            model,
            query_prompt=query_prompt,
            passage_prompt=passage_prompt,
            device=device,
            half=half,
            batch_size=batch_size,
        )
        with new_index(directory, restart=restart) as (target, work):
            with PassageWriter(target) as writer:
                for passage in _progress(passages, "Reading", show_progress):
                    writer.write(passage)
            if structure == "ivfpq" and len(writer) < MIN_IVFPQ:
                raise ValueError(f"ivfpq needs at least {MIN_IVFPQ} passages, got {len(writer)}. Use flat.")
            _continue(work, encoder, corpus=writer.fingerprint, shard_size=shard_size, dtype=dtype)
            shards = _embed(StoredPassages(target), encoder, work, shard_size, dtype, show_progress)
            vectors = make_index(shards, len(writer), encoder.dimension, structure, dtype)
            write_vectors(vectors, target / VECTORS_FILE)
            np.save(target / PROBE_FILE, encoder.probe)
            write_manifest(
                target,
                KIND,
                VERSION,
                passages=len(writer),
                corpus=writer.fingerprint,
                model=encoder.name,
                dimension=encoder.dimension,
                query_prompt=encoder.query_prompt,
                passage_prompt=encoder.passage_prompt,
                structure=structure,
                dtype=dtype,
            )
        return cls(
            read_vectors(Path(directory) / VECTORS_FILE, True),
            StoredPassages(Path(directory)),
            encoder,
            Path(directory),
        )

    def __len__(self) -> int:
        """Number of passages."""
        return len(self._passages)

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The `k` passages nearest to a query, nearest first."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        """
        The results of `search` for each of several queries, in order.

        Raises:
            ValueError: `k` is not positive.
            TypeError: `queries` is a single string.
        """
        check_request(queries, k)
        if not queries:
            return []
        found = nearest(self._vectors, self._encoder.queries(queries), k)
        return [with_scores(self._passages, rows.tolist(), products.tolist()) for rows, products in found]

    def save(self, directory: str | Path) -> None:
        """
        Copies the index to another directory (by hard links where it can); it appears complete or not at all.

        Raises:
            FileExistsError: The directory holds something that is no index.
        """
        copy_index(self._directory, directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        model: "str | Path | SentenceTransformer | None" = None,
        device: str | None = None,
        half: bool = False,
        effort: int | None = None,
        mmap: bool = True,
    ) -> "DenseIndex":
        """
        Loads an index, and the model that it was built with.

        Args:
            directory (`str` or `Path`):
                Where it was built.
            model (`str`, `Path` or `SentenceTransformer`, *optional*):
                Where the model is now, if not where it was.
            device (`str`, *optional*):
                For the model; by default a GPU when there is one.
            half (`bool`, *optional*, defaults to `False`):
                Whether the model computes in half precision.
            effort (`int`, *optional*):
                Cells that a query visits (`ivfpq`, by default 64) or candidates that it keeps (`hnsw`, by default
                128). More are slower and more exact.
            mmap (`bool`, *optional*, defaults to `True`):
                Whether to leave vectors and passages on disk and map them into memory.

        Raises:
            FileNotFoundError: There is no index in the directory, or no model where it was.
            ValueError: The index is of another kind or version, a file of it is missing or damaged, or the model is
                not the one that it was built with.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_kind(directory, manifest, KIND, VERSION)
        model = manifest["model"] if model is None else model
        if model is None:
            raise ValueError(f"{directory} does not know the name of its model. Give it: load(…, model=…).")
        vectors = read_vectors(directory / VECTORS_FILE, mmap)
        passages: Sequence[Passage] = StoredPassages(directory)
        if not len(passages) == vectors.ntotal == manifest["passages"] or vectors.d != manifest["dimension"]:
            raise ValueError(
                f"the index in {directory} is damaged: its manifest says {manifest['passages']} passages of "
                f"{manifest['dimension']} numbers, its vectors are {vectors.ntotal} of {vectors.d}, its text has "
                f"{len(passages)}. Build it again."
            )
        prompts = {name: manifest[name] for name in ("query_prompt", "passage_prompt")}
        encoder = Encoder(model, device=device, half=half, **prompts)
        _check_model(directory, manifest, encoder)
        set_effort(vectors, effort)
        return cls(vectors, passages if mmap else list(passages), encoder, directory)


def _check_model(directory: Path, manifest: dict[str, Any], encoder: Encoder) -> None:
    ours, name = manifest["model"] or "another model", encoder.name or "the model"
    advice = "Load it with the model that it was built with, or build it again."
    if encoder.dimension != manifest["dimension"]:
        raise ValueError(
            f"{name} gives vectors of {encoder.dimension} numbers, the index in {directory} has vectors of "
            f"{manifest['dimension']} (built with {ours}). {advice}"
        )
    if not encoder.same_as(np.load(directory / PROBE_FILE)):
        raise ValueError(
            f"{name} gives other vectors than the model that the index in {directory} was built with ({ours}): a test "
            f"sentence comes out different. {advice}"
        )


def _continue(work: Path, encoder: Encoder, **settings: Any) -> None:
    """Checks that shards of an earlier attempt are what this one would write, or notes what it will write."""
    settings = {"version": VERSION, **settings, "passage_prompt": encoder.passage_prompt}
    file, probe = work / SETTINGS_FILE, work / PROBE_FILE
    if not file.exists():
        np.save(probe, encoder.probe)
        _replace(file, json.dumps(settings).encode())
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in settings.items() if earlier.get(name) != value]
    if not other and not encoder.same_as(np.load(probe)):
        other = ["model"]
    if other:
        raise ValueError(
            f"an unfinished build in {work.parent} is of another {' and '.join(other)}. Repeat that command to finish "
            "it, or throw it away with restart=True (igpo index --restart)."
        )


def _embed(
    passages: Sequence[Passage], encoder: Encoder, work: Path, shard_size: int, dtype: str, show_progress: bool
) -> list[Path]:
    """Writes the embeddings of passages as files of `shard_size` rows, leaving out those that are there."""
    starts = range(0, len(passages), shard_size)
    shards = [work / f"{i:06}.npy" for i in range(len(starts))]
    shapes = [(min(shard_size, len(passages) - start), encoder.dimension) for start in starts]
    todo = [i for i, shard in enumerate(shards) if not _is_whole(shard, shapes[i])]
    done = len(passages) - sum(shapes[i][0] for i in todo)
    with _progress(None, "Embedding", show_progress, total=len(passages), initial=done) as bar:
        for i in todo:
            vectors = np.empty(shapes[i], dtype=dtype)
            for row in range(0, len(vectors), _CHUNK):
                rows = vectors[row : row + _CHUNK]
                chunk = passages[starts[i] + row : starts[i] + row + len(rows)]
                found = encoder.passages([f"{p.title}\n{p.text}" if p.title else p.text for p in chunk])
                rows[:] = found
                if not np.isfinite(found).all():
                    bad = chunk[int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])]
                    raise ValueError(f"{encoder.name} gives passage {bad.id!r} a vector that is not finite.")
                bar.update(len(chunk))
            temporary = shards[i].with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.save(file, vectors)
            os.replace(temporary, shards[i])
    return shards


def _is_whole(shard: Path, shape: tuple[int, int]) -> bool:
    """Whether a shard is there with all its rows; after a power cut it may lack some."""
    try:
        return np.load(shard, mmap_mode="r").shape == shape
    except (FileNotFoundError, ValueError, EOFError):
        return False


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _progress(items: Iterator[Passage] | None, what: str, show: bool, **options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit=" passages", leave=False, disable=not show, **options)
