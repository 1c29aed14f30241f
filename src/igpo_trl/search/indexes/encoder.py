"""Texts to unit vectors, with a sentence-transformers model and its prompts."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...files import encodable
from ..extras import require

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# e5 models are trained with prompts that few of them have in their configuration. Instruction-tuned ones use others.
_E5 = re.compile(r"(^|[-_./])e5([-_.]|$)", re.IGNORECASE)
_PASSAGE_PROMPTS = ("document", "passage", "corpus")

PROBE = "The quick brown fox jumps over the lazy dog near the harbour of Lisbon."
"""A sentence whose embedding identifies a model."""

MIN_SAME = 0.99
"""Cosine of two probes above which their models are the same; half precision stays above 0.9999."""


class Encoder:
    """
    Embeds queries and passages with a [sentence-transformers](https://sbert.net) model, `StaticEmbedding` included.

    Args:
        model (`str`, `Path` or `SentenceTransformer`): Name on the hub, a folder, or the model itself.
        query_prompt, passage_prompt (`str`, *optional*): Prefix of every query or passage; `""` for none. By default
            those of the model's configuration, or `"query: "` and `"passage: "` for e5 models.
        device (`str`, *optional*): Such as `"cuda:1"`; by default a GPU if there is one.
        half (`bool`, *optional*, defaults to `False`): Whether to compute in half precision, about twice as fast on a
            GPU.
        batch_size (`int`, *optional*, defaults to `64`): Texts per forward pass.

    Raises:
        FileNotFoundError: The folder does not exist.
        OSError: The hub has no such model, or cannot be reached.
        ImportError: sentence-transformers is not installed.
    """

    def __init__(
        self,
        model: "str | Path | SentenceTransformer",
        *,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        device: str | None = None,
        half: bool = False,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"got batch_size={batch_size}, expected at least 1.")
        library = require("sentence_transformers", "Dense search", "dense")
        self.name: str | None = None  # unknown if `model` is a model
        if isinstance(model, str | Path):
            path = Path(model).expanduser()
            if not path.exists() and (isinstance(model, Path) or model.startswith((".", "/", "~"))):
                raise FileNotFoundError(f"no such model: {model}. Expected a folder, or a name on the hub.")
            self.name = str(path.resolve()) if path.exists() else str(model)
            self._model: Any = library.SentenceTransformer(self.name, device=device)
        else:
            self._model = model if device is None else model.to(device)
        if half:
            self._model.half()
        self._batch_size = batch_size
        defaults = _prompts(self._model, self.name or "")
        self.query_prompt = defaults[0] if query_prompt is None else query_prompt
        self.passage_prompt = defaults[1] if passage_prompt is None else passage_prompt
        self.probe = self.passages([PROBE])[0]
        self.dimension = len(self.probe)

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of queries, shape `(len(texts), dimension)`."""
        return self._encode(self._model.encode_query, texts, self.query_prompt)

    def passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of passages, shape `(len(texts), dimension)`."""
        return self._encode(self._model.encode_document, texts, self.passage_prompt)

    def _encode(self, function: Any, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        vectors = function(
            list(map(encodable, texts)),  # tokenizers refuse lone surrogates
            prompt=prompt,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def same_as(self, probe: NDArray[Any]) -> bool:
        """Whether another encoder's probe equals this one's, up to rounding."""
        return probe.shape == self.probe.shape and float(probe.astype(np.float32) @ self.probe) > MIN_SAME


def _prompts(model: Any, name: str) -> tuple[str, str]:
    """Prompts for queries and passages, from a model's configuration or its name."""
    own = model.prompts or {}
    query = own.get("query") or ""
    passage = next((own[key] for key in _PASSAGE_PROMPTS if own.get(key)), "")
    name = Path(name).name
    if not query and not passage and _E5.search(name) and "instruct" not in name:
        return "query: ", "passage: "
    return query, passage
