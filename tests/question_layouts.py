"""One or two rows of each question set with its published columns, and the expected results."""

import json

PAGES = {
    "title": ["Dune (novel)", "Frank Herbert", "Arrakis"],
    "sentences": [["It is a novel."], ["Born in 1920."], ["A planet."]],
}

# Hub: google-research-datasets/nq_open. No ids.
NQ_OPEN = [
    {"question": "who wrote dune", "answer": ["Frank Herbert", "Herbert"]},
    {"question": "when was dune published", "answer": ["1965"]},
]

# Hub: mandarjoshi/trivia_qa, configuration rc.nocontext.
TRIVIAQA = [
    {
        "question": "Which planet is Dune?",
        "question_id": "tc_2",
        "question_source": "http://www.triviacountry.com/",
        "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
        "search_results": {
            "description": [],
            "filename": [],
            "rank": [],
            "title": [],
            "url": [],
            "search_context": [],
        },
        "answer": {
            "aliases": ["Arrakis", "Dune (planet)"],
            "normalized_aliases": ["arrakis", "dune planet"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "arrakis",
            "type": "WikipediaEntity",
            "value": "Arrakis",
        },
    }
]

# The original file: {"Data": [...]}.
TRIVIAQA_FILE = {
    "Data": [
        {
            "Answer": {"Aliases": ["Arrakis", "Dune (planet)"], "NormalizedAliases": ["arrakis"], "Value": "Arrakis"},
            "Question": "Which planet is Dune?",
            "QuestionId": "tc_2",
            "EntityPages": [],
        }
    ]
}

# Hub: hotpotqa/hotpot_qa, configuration distractor.
HOTPOTQA = [
    {
        "id": "5a7a06935542990198eaf050",
        "question": "When was the author of Dune born?",
        "answer": "1920",
        "type": "bridge",
        "level": "medium",
        "supporting_facts": {"title": ["Dune (novel)", "Frank Herbert", "Frank Herbert"], "sent_id": [0, 0, 1]},
        "context": PAGES,
    }
]

# The original file: an array, facts and pages as pairs.
HOTPOTQA_FILE = [
    {
        "_id": "5a7a06935542990198eaf050",
        "question": "When was the author of Dune born?",
        "answer": "1920",
        "type": "bridge",
        "level": "medium",
        "supporting_facts": [["Dune (novel)", 0], ["Frank Herbert", 0], ["Frank Herbert", 1]],
        "context": [["Dune (novel)", ["It is a novel."]], ["Frank Herbert", ["Born in 1920."]]],
    }
]

# The original file of 2WikiMultihopQA.
TWOWIKI_FILE = [
    {
        "_id": "8813f87c",
        "type": "compositional",
        "question": "Who is the mother of the director of Dune?",
        "context": [["Dune (1984 film)", ["By David Lynch."]], ["David Lynch", ["Son of Edwina."]]],
        "supporting_facts": [["Dune (1984 film)", 0], ["David Lynch", 0]],
        "evidences": [["Dune", "director", "David Lynch"], ["David Lynch", "mother", "Edwina Lynch"]],
        "answer": "Edwina Lynch",
    },
    {
        "_id": "97f5c1d2",
        "type": "bridge_comparison",
        "question": "Which film has the older director, Dune or Alien?",
        "context": [],
        "supporting_facts": [["Dune", 0], ["Alien", 0], ["David Lynch", 0], ["Ridley Scott", 0]],
        "evidences": [],
        "answer": "Alien",
    },
]

# Hub: framolfese/2WikiMultihopQA has facts in columns; xanhho/2WikiMultihopQA has everything nested as JSON text.
TWOWIKI = [
    {
        "id": row["_id"],
        "question": row["question"],
        "answer": row["answer"],
        "type": row["type"],
        "supporting_facts": {
            "title": [title for title, _ in row["supporting_facts"]],
            "sent_id": [number for _, number in row["supporting_facts"]],
        },
        "context": PAGES,
    }
    for row in TWOWIKI_FILE
]
TWOWIKI_TEXT = [
    row | {name: json.dumps(row[name]) for name in ("context", "supporting_facts", "evidences")}
    for row in TWOWIKI_FILE
]

# Hub: dgslibisey/MuSiQue, and the original files.
MUSIQUE = [
    {
        "id": "2hop__460946_294723",
        "paragraphs": [
            {"idx": 0, "title": "Arrakis", "paragraph_text": "A planet.", "is_supporting": False},
            {"idx": 1, "title": "Dune (novel)", "paragraph_text": "By Frank Herbert.", "is_supporting": True},
            {"idx": 2, "title": "Frank Herbert", "paragraph_text": "Born in 1920.", "is_supporting": True},
        ],
        "question": "When was the author of Dune born?",
        "question_decomposition": [
            {"id": 460946, "question": "Dune >> author", "answer": "Frank Herbert", "paragraph_support_idx": 1},
            {"id": 294723, "question": "#1 >> birth", "answer": "1920", "paragraph_support_idx": 2},
        ],
        "answer": "1920",
        "answer_aliases": ["October 8, 1920"],
        "answerable": True,
    }
]

# Hub: chiayewken/bamboogle. No ids.
BAMBOOGLE = [{"Question": "Who was born first, Frank Herbert or Ridley Scott?", "Answer": "Frank Herbert"}]

# Hub: akariasai/PopQA, a file test.tsv.
POPQA = [
    {
        "id": 4222362,
        "subj": "Dune",
        "prop": "author",
        "obj": "Frank Herbert",
        "subj_id": 1,
        "s_aliases": '["Dune (novel)"]',
        "s_wiki_title": "Dune (novel)",
        "s_pop": 142,
        "question": "Who is the author of Dune?",
        "possible_answers": '["Franklin Herbert", "Frank Herbert", "Frank Patrick Herbert"]',
    }
]

# Hub: RUC-NLPIR/FlashRAG_datasets, one configuration per set: the same columns for all, the rest in `metadata`.
FLASHRAG = {
    "nq": ("test", [{"id": "test_0", "question": "who wrote dune", "golden_answers": ["Frank Herbert", "Herbert"]}]),
    "triviaqa": (
        "test",
        [{"id": "test_0", "question": "Which planet is Dune?", "golden_answers": ["Arrakis", "Dune (planet)"]}],
    ),
    "popqa": (
        "test",
        [
            {
                "id": "test_0",
                "question": "Who is the author of Dune?",
                "golden_answers": ["Frank Herbert"],
                "metadata": {"subj": "Dune", "prop": "author", "obj": "Frank Herbert"},
            }
        ],
    ),
    "hotpotqa": (
        "dev",
        [
            {
                "id": "dev_0",
                "question": HOTPOTQA[0]["question"],
                "golden_answers": ["1920"],
                "metadata": {name: HOTPOTQA[0][name] for name in ("type", "level", "supporting_facts", "context")},
            }
        ],
    ),
    "2wikimultihopqa": (
        "dev",
        [
            {
                "id": f"dev_{number}",
                "question": row["question"],
                "golden_answers": [row["answer"]],
                "metadata": {"type": row["type"], "supporting_facts": row["supporting_facts"]},
            }
            for number, row in enumerate(TWOWIKI)
        ],
    ),
    "musique": (
        "dev",
        [
            {
                "id": "dev_0",
                "question": MUSIQUE[0]["question"],
                "golden_answers": ["1920", "October 8, 1920"],
                "metadata": {
                    "answerable": True,
                    "question_decomposition": [
                        {
                            "id": 460946,
                            "question": "Dune >> author",
                            "answer": "Frank Herbert",
                            "support_paragraph": {"idx": 1, "title": "Dune (novel)", "paragraph_text": "By …"},
                        },
                        {
                            "id": 294723,
                            "question": "#1 >> birth",
                            "answer": "1920",
                            "support_paragraph": {"idx": 2, "title": "Frank Herbert", "paragraph_text": "Born …"},
                        },
                    ],
                },
            }
        ],
    ),
    "bamboogle": (
        "test",
        [{"id": "test_0", "question": BAMBOOGLE[0]["Question"], "golden_answers": ["Frank Herbert"], "metadata": {}}],
    ),
}

TWO_PAGES = ["Dune (novel)", "Frank Herbert"]
FOUR_PAGES = ["Dune", "Alien", "David Lynch", "Ridley Scott"]

# answers, hops and supporting titles of every row
EXPECTED = {
    "nq": [(["Frank Herbert", "Herbert"], 1, []), (["1965"], 1, [])],
    "triviaqa": [(["Arrakis", "Dune (planet)"], 1, [])],
    "popqa": [(["Frank Herbert", "Franklin Herbert", "Frank Patrick Herbert"], 1, ["Dune (novel)"])],
    "hotpotqa": [(["1920"], 2, TWO_PAGES)],
    "2wiki": [(["Edwina Lynch"], 2, ["Dune (1984 film)", "David Lynch"]), (["Alien"], 4, FOUR_PAGES)],
    "musique": [(["1920", "October 8, 1920"], 2, TWO_PAGES)],
    "bamboogle": [(["Frank Herbert"], 2, [])],
}
