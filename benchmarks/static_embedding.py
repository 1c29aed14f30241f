"""
A dense retriever without a download: one fixed random vector per word, scaled by the rarity of the word.

    python benchmarks/static_embedding.py --out outputs/static corpus/*.jsonl.gz
    igpo index --kind dense --model outputs/static --corpus corpus/nq.jsonl.gz --out outputs/nq-dense

The length of a word's vector is the word's inverse document frequency in the corpora, and a text's vector is the mean
of its words' vectors: the cosine of two texts approximates that of their tf-idf vectors. It knows no synonyms. The
same files and seed give the same vectors.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from igpo_trl.search.passages import read_passages

UNKNOWN = "[UNK]"


def make_tokenizer(words: list[str]) -> Tokenizer:
    """A tokenizer of whole words, without case and accents."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    return tokenizer


def make_static_embedding(corpora: list[Path], out: Path, dimension: int, vocabulary: int, seed: int) -> None:
    """Counts words in the corpora and saves a sentence-transformers model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    splitter = make_tokenizer([UNKNOWN])
    frequency: Counter[str] = Counter()
    passages = 0
    for corpus in corpora:
        for passage in read_passages(corpus):
            text = splitter.normalizer.normalize_str(f"{passage.title} {passage.text}")
            frequency.update({word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text)})
            passages += 1
    ranked = sorted((item for item in frequency.items() if item[1] > 1), key=lambda item: (-item[1], item[0]))
    words, counts = zip(*ranked[:vocabulary], strict=True)
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((1 + len(words), dimension), dtype=np.float32) / dimension**0.5
    vectors[0] = 0  # words that occur in fewer than two passages
    vectors[1:] *= np.log(passages / np.asarray(counts, dtype=np.float32))[:, None]
    embedding = StaticEmbedding(make_tokenizer([UNKNOWN, *words]), embedding_weights=vectors)
    SentenceTransformer(modules=[embedding], device="cpu").save(str(out))
    print(f"{out}: {len(words)} words of {passages} passages, {dimension} dimensions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path, help="Files of passages.")
    parser.add_argument("--out", type=Path, required=True, help="Directory of the model.")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=60_000, help="Number of most frequent words to keep.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_static_embedding(options.corpora, options.out, options.dimension, options.vocabulary, options.seed)
