"""Synthetic runs for the tests of the page."""

from igpo_trl.trajectory import Call, Trajectory, Turn

CALL = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call><|im_end|>'


def rollout(question="Who?", answers=("Ada",), beliefs=(0.1, 0.6), outcome=1.0, step=0, group=0, **more):
    """A rollout that searches once before each belief but the first, and then answers."""
    queries, texts = more.pop("queries", None), more.pop("texts", None)
    gains = [after - before for before, after in zip(beliefs, beliefs[1:], strict=False)]
    turns = [
        Turn(
            CALL % (queries[k] if queries else f"query {k}"),
            f"<tool_response>\n{texts[k] if texts else f'[1] Page {k}'}\n</tool_response>",
            num_tokens=10,
            belief=beliefs[k],
            info_gain=gain,
            advantage=gain,
            calls=[Call("search", {"query": "x"})],
        )
        for k, gain in enumerate(gains)
    ]
    said = more.pop("said", answers[0] if outcome == 1 else "Eve")
    turns.append(Turn(f"<answer>{said}</answer><|im_end|>", num_tokens=5, belief=beliefs[-1]))
    return Trajectory(
        prompt="",
        question=question,
        turns=turns,
        answers=list(answers),
        outcome=outcome,
        rewards={"answer_reward": outcome},
        step=step,
        group=group,
        stop_reason=more.pop("stop_reason", "answered"),
        **more,
    )


def training(steps=10, groups=3, size=4, rising=True):
    """A run whose share of right answers rises (or does not), with a new question in every group."""
    run = []
    for step in range(steps):
        right = round(size * step / (steps - 1)) if rising else size // 2
        for group in range(groups):
            for i in range(size):
                end, outcome = (0.9, 1.0) if i < right else (0.05, 0.0)
                beliefs = (0.1, 0.5, end) if i % 2 else (0.1, end)
                run.append(
                    rollout(f"Question {step}-{group}?", beliefs=beliefs, outcome=outcome, step=step, group=group)
                )
    return run


def evaluation(right, questions=12, name="test"):
    """One rollout per question; those whose numbers are in `right` are answered right."""
    return [
        rollout(
            f"Question {i}?",
            beliefs=(0.1, 0.8 if i in right else 0.2),
            outcome=float(i in right),
            data_set=name,
            info={"dataset": name, "id": str(i), "sample": 0},
        )
        for i in range(questions)
    ]
