"""
How hard the world of `igpo world` is for BM25, by number of hops: what one search with the question finds, and what
the searches find that follow the decomposition of the question.

    python benchmarks/world.py                            # the default world
    python benchmarks/world.py --size 20000 --seed 1
"""

import argparse
import re

from igpo_trl.data.english import DEFAULT_SIZE, SPLITS, make_world
from igpo_trl.evaluation.scores import has_answer
from igpo_trl.search import BM25Index, SearchTool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE)
    parser.add_argument("-k", type=int, default=2, help="passages per search")
    parser.add_argument("--max-words", type=int, default=50, help="longest passage shown")
    args = parser.parse_args()
    world = make_world(args.seed, args.size)
    search = SearchTool(BM25Index.build(world.corpus), args.k, args.max_words)
    print("| questions | hops | number | answer, question as query | first page, question as query | all steps |")
    print("|---|---|---|---|---|---|")
    for split in SPLITS:
        for hops in range(1, 5):
            rows = [row for row in world.questions[split] if row["hops"] == hops]
            steps = [[(step, search(query=step["title"])) for step in row["question_decomposition"]] for row in rows]
            first = [(row, search(query=row["question"])) for row in rows]
            # The answer of a comparison is in its question, and yes or no are not looked for.
            chains = [has_answer([text], row["answers"]) for row, text in first if row["type"] in ("lookup", "bridge")]
            started = [row["supporting_titles"][0] in titles(text) for row, text in first]
            followed = [all(is_read(*step) for step in of_row) for of_row in steps]
            shares = (f"{100 * sum(found) / len(found):.1f}" for found in (chains, started, followed))
            print(f"| {split} | {hops} | {len(rows)} | {' | '.join(shares)} |")


def titles(observation: str) -> list[str]:
    """Titles of the passages in a search result."""
    return re.findall(r"^\[\d+\] (.*)$", observation, re.MULTILINE)


def is_read(step: dict[str, str], observation: str) -> bool:
    """Whether a search found the step's page, down to its answer."""
    return step["title"] in titles(observation) and has_answer([observation], [step["answer"]])


if __name__ == "__main__":
    main()
