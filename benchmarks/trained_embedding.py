"""
A trained encoder from a Python package: the static embedding of WordLlama, as a sentence-transformers model.

    pip install --no-deps wordllama==0.4.0.post1
    python benchmarks/trained_embedding.py --out outputs/wordllama
    igpo index --kind dense --model outputs/wordllama --corpus corpus/nq.jsonl.gz --out outputs/nq-dense

WordLlama (https://github.com/dleemiller/WordLlama, MIT licence) has one vector of 256 numbers per token of Llama 2,
trained for similarity; a text's vector is the mean of its tokens' vectors. The wheel contains the weights (16 MB), so
no hub is needed. It is a small encoder: its authors report lower scores than all-MiniLM-L6-v2 on every task of MTEB.
"""

import argparse
import importlib.util
from pathlib import Path

from tokenizers import Tokenizer


def wordllama_files() -> tuple[Path, Path]:
    """Paths of weights and tokenizer in the installed package, which is not imported."""
    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise SystemExit("wordllama is not installed. Install it with: pip install --no-deps wordllama==0.4.0.post1")
    package = Path(spec.origin).parent
    return package / "weights/l2_supercat_256.safetensors", package / "tokenizers/l2_supercat_tokenizer_config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Directory of the model.")
    options = parser.parse_args()
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights, tokenizer = wordllama_files()
    vectors = load_file(weights)["embedding.weight"].float()
    embedding = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=vectors)
    SentenceTransformer(modules=[embedding], device="cpu").save(str(options.out))
    print(f"{options.out}: {len(vectors)} tokens, {vectors.shape[1]} dimensions")


if __name__ == "__main__":
    main()
