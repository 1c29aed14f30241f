"""Options that define a rollout, of every command that makes some. They are named after what they set."""

from functools import partial
from typing import Annotated

import typer

option = partial(typer.Option, rich_help_panel="Rollouts")

Adapter = Annotated[str | None, typer.Option(help="PEFT adapter on top of the model.")]
MaxWords = Annotated[int | None, option(help="Longest passage shown, in words.", show_default="200")]
ManyQueries = Annotated[bool | None, option("--many-queries", help="Allow several queries per search.")]
SystemPrompt = Annotated[
    str | None, option(help="think, no_think, none, a text, or a file with a text.", show_default="think")
]
MaxTurns = Annotated[int | None, option(help="Turns, including the answer.", show_default="8")]
MaxTurnLength = Annotated[int | None, option(help="Sampled tokens of one turn.")]
MaxCompletionLength = Annotated[
    int | None, option(help="Tokens of a rollout, including passages.", show_default="8192")
]
ForcedAnswer = Annotated[
    bool | None, option("--forced-answer/--no-forced-answer", help="Ask for an answer at a limit.")
]
StopTools = Annotated[
    list[str] | None, option(help="Tool whose call ends a rollout: final_answer, which is then added.")
]
Temperature = Annotated[float, option(help="0 takes the most likely token.", min=0.0)]
Seed = Annotated[int, option(help="Seed of the sampling.")]
DType = Annotated[str | None, option(help="Type of the weights; bfloat16 on a GPU, else float32.")]
