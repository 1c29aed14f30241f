"""The code in a model card that runs the agent with its tools."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_LOOP = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_trl.rewards import extract_answer, last_assistant_text
{imports}functions = list(tools.values()) or None

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto", device_map="auto")

messages = [
{system}    {{"role": "user", "content": "Which river flows through the capital of Austria?"}},
]
for _ in range({turns}):  # turns
    prompt = tokenizer.apply_chat_template(
        messages, tools=functions, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**prompt, max_new_tokens={tokens}, do_sample=False)
    context, turn = output[0].tensor_split([prompt["input_ids"].shape[1]])
    try:
        message = tokenizer.parse_response(turn, prefix=context, tools=functions)
    except ValueError:  # a call that cannot be read
        break
    messages.append(message)
    if not message.get("tool_calls"):
        break
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            result = tools[name](**arguments)
        except (KeyError, TypeError) as error:  # the model has made up a tool or an argument
            result = f"Error: {{error}}"
        messages.append({{"role": "tool", "name": name, "content": str(result)}})
print(extract_answer(last_assistant_text(messages)))"""


def make_snippet(trainer: Any, folder: Path, repository: str) -> str:
    """
    How to run what was trained, as Markdown: a command where its tool is our search, and a program.

    Args:
        trainer ([`IGPOTrainer`]): the run.
        folder (`Path`): of the model, whose igpo.yaml says how it searched.
        repository (`str`): what the program calls the model.
    """
    args, tools = trainer.args, [tool for tool in trainer.tools or () if hasattr(tool, "__name__")]
    ours = [tool.__name__ for tool in tools if getattr(tool, "__module__", "") == "igpo_trl.search.tool"]
    imports, command = "", ""
    if ours:
        saved = _saved_options(folder)
        options = {name: saved.get(f"search_{name}") for name in ("k", "max_words", "many_queries")}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value)
        imports = f'from igpo_trl.search import SearchTool\n\ntools = {{"search": SearchTool("path/to/index"{given})}}'
        note = "" if given else "  # and the k and max_words of training"
        imports += note + "\n"
        command = (
            f'```bash\nigpo ask --model {repository} --index path/to/index "Which river flows through the capital of '
            'Austria?"\n```\n\nOr in a program:\n\n'
        )
    else:
        imports = _other_tools(tools)
    system = _system_prompt(trainer.train_dataset)
    line = f'    {{"role": "system", "content": {json.dumps(system, ensure_ascii=False)}}},\n' if system else ""
    code = _LOOP.format(
        imports=imports, repository=repository, system=line, turns=args.max_turns or 8,
        tokens=args.max_turn_length or args.max_completion_length,
    )  # fmt: skip
    return f"{command}```python\n{code}\n```"


def _other_tools(tools: Sequence[Any]) -> str:
    """Functions, or methods of the environment of a rollout, which only their owner has the code of."""
    owner = next((type(tool.__self__).__name__ for tool in tools if hasattr(tool, "__self__")), None)
    names = [tool.__name__ for tool in tools]
    entries = ", ".join(f'"{name}": {"environment." if owner else ""}{name}' for name in names)
    head = ""
    if owner is not None:
        head = f"from your_tools import {owner}\n\nenvironment = {owner}()  # and `environment.reset(…)`"
    elif names:
        head = f"from your_tools import {', '.join(names)}  # those below\n"
    return f"{head}\ntools = {{{entries}}}\n"


def _saved_options(folder: Path) -> dict[str, Any]:
    """The options in the igpo.yaml beside a model, where there is one."""
    try:
        values = yaml.safe_load((folder / "igpo.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _system_prompt(dataset: Any) -> str:
    """Of the first question, unless the questions come as a stream."""
    prompt = dataset[0].get("prompt") if hasattr(dataset, "__getitem__") and len(dataset) else None
    first = prompt[0] if isinstance(prompt, list) and prompt else {}
    content = first.get("content") if first.get("role") == "system" else ""
    return content if isinstance(content, str) else ""
