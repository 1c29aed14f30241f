"""Dense search: passages as vectors, embedded in shards so that an interrupted build can resume."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import replace_when_complete
from ..passages import Corpus, Passage, read_passages
from .directory import MANIFEST_FILE, Index, link_or_copy, new_index, read_manifest, write_manifest
from .encoder import Encoder
from .faiss_index import (
    MIN_IVFPQ,
    build_faiss_index,
    check_structure,
    nearest,
    read_faiss_index,
    set_effort,
    write_faiss_index,
)
from .passage_file import PassageWriter, StoredPassages, with_scores

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND, VERSION = "igpo_trl.dense", 1
VECTORS_FILE, PROBE_FILE, SETTINGS_FILE = "vectors.faiss", "probe.npy", "settings.json"

_CHUNK = 1024  # passages between two updates of the progress bar


class DenseIndex(Index):
    """
    Search by the inner product of unit vectors, one per query and one per passage.

    Scores are cosines, up to the rounding of the stored vectors. The index contains its passages and vectors but not
    the model, which is loaded by its name or folder.

    Example:

    ```python
    >>> index = DenseIndex.build("corpus.jsonl.gz", "index/", model="intfloat/e5-base-v2")
    >>> index = DenseIndex.load("index/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=0.87), …]
    ```
    """

    def __init__(self, vectors: Any, passages: Sequence[Passage], encoder: Encoder, directory: Path) -> None:
        self._vectors = vectors
        self.passages = passages
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

        The index appears in its directory complete or not at all. If a build is interrupted, calling it again with
        the same corpus, model and settings resumes it after the last complete shard.

        Args:
            corpus (`str`, `Path`, or iterable of these, of `dict` or of `Passage`): As for [`BM25Index.build`].
            directory (`str` or `Path`): Directory for the index.
            model (`str`, `Path` or `SentenceTransformer`): Name on the hub, a folder, or the model itself.
            structure (`str`, *optional*, defaults to `"flat"`): `"flat"`, `"hnsw"` or `"ivfpq"`; [`build_faiss_index`]
                says when to use which.
            dtype (`str`, *optional*, defaults to `"float16"`): Type of the stored vectors, `"float16"` or `"float32"`.
            query_prompt, passage_prompt, batch_size, device, half:
                As for [`Encoder`].
            shard_size (`int`, *optional*, defaults to `8192`): Passages per shard: what an interruption may cost.
            restart (`bool`, *optional*, defaults to `False`): Whether to discard the work of an interrupted build.
            show_progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Raises:
            FileNotFoundError: A file or folder does not exist.
            FileExistsError: The directory contains something other than an index.
            BlockingIOError: Another process is building this index.
            ValueError: As for [`BM25Index.build`]; or the model returns a vector that is not finite; or an interrupted
                build had another corpus, model or setting.
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
            _check_earlier_build(work, encoder, corpus=writer.fingerprint, shard_size=shard_size, dtype=dtype)
            shards = _embed(StoredPassages(target), encoder, work, shard_size, dtype, show_progress)
            vectors = build_faiss_index(shards, len(writer), encoder.dimension, structure, dtype)
            write_faiss_index(vectors, target / VECTORS_FILE)
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
        directory = Path(directory)
        return cls(read_faiss_index(directory / VECTORS_FILE, True), StoredPassages(directory), encoder, directory)

    def __len__(self) -> int:
        """Number of passages."""
        return len(self.passages)

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        results = nearest(self._vectors, self._encoder.queries(queries), k)
        return [with_scores(self.passages, rows.tolist(), products.tolist()) for rows, products in results]

    def _write(self, directory: Path) -> None:
        for name in [*read_manifest(self._directory)["files"], MANIFEST_FILE]:
            link_or_copy(self._directory / name, directory / name)

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
        Loads an index and the model that it was built with.

        Args:
            directory (`str` or `Path`): Where it was built or saved.
            model (`str`, `Path` or `SentenceTransformer`, *optional*): The model, if it has moved since the build.
            device, half:
                As for [`Encoder`].
            effort (`int`, *optional*): Cells that a query visits (`ivfpq`, by default 64) or candidates that it
                considers (`hnsw`, by default 128). More are slower and more exact.
            mmap (`bool`, *optional*, defaults to `True`): Whether to leave vectors and passages on disk and map them
                into memory.

        Raises:
            FileNotFoundError: There is no index in the directory, or the model is not where it was.
            ValueError: The index is of another kind or version, one of its files is missing or damaged, or the model
                is not the one that the index was built with.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, KIND, VERSION)
        model = manifest["model"] if model is None else model
        if model is None:
            raise ValueError(f"{directory} does not know the name of its model. Pass the model: load(…, model=…).")
        vectors = read_faiss_index(directory / VECTORS_FILE, mmap)
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
    """Checks that a model is the one that an index was built with."""
    original, name = manifest["model"] or "another model", encoder.name or "the model"
    advice = "Load it with the model that it was built with, or build it again."
    if encoder.dimension != manifest["dimension"]:
        raise ValueError(
            f"{name} has vectors of {encoder.dimension} numbers, the index in {directory} has vectors of "
            f"{manifest['dimension']} (built with {original}). {advice}"
        )
    if not encoder.same_as(np.load(directory / PROBE_FILE)):
        raise ValueError(
            f"{name} gives other vectors than the model that the index in {directory} was built with ({original}), as "
            f"a test sentence shows. {advice}"
        )


def _check_earlier_build(work: Path, encoder: Encoder, **settings: Any) -> None:
    """Checks that the shards of an earlier attempt, if any, fit this one; else records the settings of this one."""
    settings = {"version": VERSION, **settings, "passage_prompt": encoder.passage_prompt}
    file, probe = work / SETTINGS_FILE, work / PROBE_FILE
    if not file.exists():
        np.save(probe, encoder.probe)
        with replace_when_complete(file) as temporary:
            temporary.write_text(json.dumps(settings), encoding="utf-8")
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name, value in settings.items() if earlier.get(name) != value]
    if not different and not encoder.same_as(np.load(probe)):
        different = ["model"]
    if different:
        raise ValueError(
            f"an unfinished build in {work.parent} has another {' and '.join(different)}. Repeat that command to "
            "finish it, or discard it with restart=True (igpo index --restart)."
        )


def _embed(
    passages: Sequence[Passage], encoder: Encoder, work: Path, shard_size: int, dtype: str, show_progress: bool
) -> list[Path]:
    """Writes the embeddings of passages to files of `shard_size` rows each, except those that are already complete."""
    starts = range(0, len(passages), shard_size)
    shards = [work / f"{i:06}.npy" for i in range(len(starts))]
    shapes = [(min(shard_size, len(passages) - start), encoder.dimension) for start in starts]
    todo = [i for i, shard in enumerate(shards) if not _is_complete(shard, shapes[i])]
    embedded = len(passages) - sum(shapes[i][0] for i in todo)
    with _progress(None, "Embedding", show_progress, total=len(passages), initial=embedded) as bar:
        for i in todo:
            rows = np.empty(shapes[i], dtype=dtype)
            for start in range(0, len(rows), _CHUNK):
                chunk = passages[starts[i] + start : starts[i] + min(start + _CHUNK, len(rows))]
                vectors = encoder.passages([f"{p.title}\n{p.text}" if p.title else p.text for p in chunk])
                finite = np.isfinite(vectors).all(axis=1)
                if not finite.all():
                    bad = chunk[int(np.argmin(finite))]
                    raise ValueError(f"{encoder.name} gives passage {bad.id!r} a vector that is not finite.")
                rows[start : start + len(chunk)] = vectors
                bar.update(len(chunk))
            with replace_when_complete(shards[i]) as temporary, open(temporary, "wb") as file:
                np.save(file, rows)
    return shards


def _is_complete(shard: Path, shape: tuple[int, int]) -> bool:
    """Whether a shard exists with all its rows; after a power cut it may be cut off."""
    try:
        return np.load(shard, mmap_mode="r").shape == shape
    except (FileNotFoundError, ValueError, EOFError):
        return False


def _progress(items: Iterator[Passage] | None, label: str, show: bool, **options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, unit=" passages", leave=False, disable=not show, **options)
