"""The arguments of `igpo train`: their help, their values from a YAML file and the command line, mistakes in them."""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from ..config import IGPOConfig
from ..data.english import find_corpus


@dataclass
class ScriptArguments:
    """Arguments of `igpo train`, besides those of the trainer (`IGPOConfig`) and the model (TRL's `ModelConfig`)."""

    questions: str = field(
        metadata={
            "help": "Training questions: a file, or sets by name, such as `hotpotqa`, `nq,hotpotqa` or `world` "
            "(docs/data.md)."
        }
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Passages to search, a file with `id`, `title` and `text` (docs/search.md), or `world` "
            "(docs/world.md). Without `index`, a BM25 index of them is built once, in the cache ($IGPO_CACHE or "
            "~/.cache/igpo_trl)."
        },
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "What to search: the directory of an index of any kind (`igpo index`), or the address of a search "
            "server (`igpo serve`). `corpus` is then not read."
        },
    )
    eval_questions: str | None = field(
        default=None,
        metadata={"help": "Evaluation questions, given in the same way. Defaults to some of `questions`, held out."},
    )
    num_eval_questions: int = field(
        default=100,
        metadata={"help": "Questions to evaluate on before and after training; 0 for no evaluation."},
    )
    system_prompt: str = field(
        default="think",
        metadata={"help": "`think`, `no_think`, `none`, a text file, or the text of a system prompt."},
    )
    search_k: int = field(default=3, metadata={"help": "Passages that one search returns."})
    search_max_words: int = field(default=200, metadata={"help": "Longest passage shown, in words."})
    search_many_queries: bool = field(
        default=False,
        metadata={"help": "Whether one search may have several queries, as in the IGPO authors' agent."},
    )
    method: str = field(
        default="igpo",
        metadata={
            "help": "`igpo`, or `grpo` for GRPO with the same arguments, rollouts and evaluation: IGPO's trainer with "
            "`info_gain_weight` 0, whose advantages are then exactly GRPO's."
        },
    )
    doctor_every: int = field(
        default=20,
        metadata={
            "help": "Optimizer steps between two looks at what may go wrong (`igpo doctor`), which warn of each "
            "signature once; 0 never looks."
        },
    )

    def __post_init__(self) -> None:
        if self.corpus is not None:
            self.corpus = str(find_corpus(self.corpus))


def own_fields(config: type, base: type | None = None) -> list[dataclasses.Field[Any]]:
    """The fields of a configuration that its base class does not have."""
    inherited = {each.name for each in dataclasses.fields(base)} if base is not None else set()
    return [each for each in dataclasses.fields(config) if each.name not in inherited]


#: What `--help` shows of TRL's and transformers' arguments.
_SHOWN = {
    "Model": "model_name_or_path dtype attn_implementation use_peft lora_r lora_alpha lora_target_modules "
    "load_in_4bit",
    "Training": "output_dir max_steps num_train_epochs learning_rate num_generations per_device_train_batch_size "
    "gradient_accumulation_steps max_completion_length temperature beta use_vllm use_cpu bf16 seed eval_strategy "
    "eval_steps logging_steps save_steps save_total_limit report_to resume_from_checkpoint push_to_hub",
}

_CONFIGS = (ScriptArguments, IGPOConfig, ModelConfig)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
_USAGE = "[--config FILE] [--OPTION VALUE ...]"
_ABOUT = (
    "Train a search agent with IGPO: a language model that searches a corpus of passages and answers questions. On "
    "several GPUs: accelerate launch -m igpo_trl train --config FILE."
)
_OPTIONS = {
    "config": "A YAML file with any of these options as keys. Those of the command line take precedence.",
    "debug": "Show the traceback of an error. (With a value it is transformers' option of this name.)",
    "estimate": "Print memory and a rough time per step, and train nothing. Only the configuration of the model is "
    "read. Takes PROCESSES:SHARDING:FLOPS, such as 8:fsdp2 or 8:zero3:3e14 (operations a second that a GPU attains).",
    "help-all": "List the options of TRL and transformers too.",
}


class UsageError(ValueError):
    """The arguments cannot be read."""


class TrainParser(TrlParser):
    """
    Parser of the command line and of configuration files, with the same rules for both.

    In TRL's, a value from a YAML file is not checked, and a mistake prints a traceback or the usage of 700 options.
    Options cannot be abbreviated, because a YAML key cannot.
    """

    def __init__(self, **options: Any):
        super().__init__(_CONFIGS, allow_abbrev=False, add_help=False, **options)
        self._hints = {name: hint for config in _CONFIGS for name, hint in get_type_hints(config).items()}
        # The first action of an option; a second one is its `--no_…`.
        self._options = {action.dest: action for action in reversed(self._actions)}
        for name in IGPOConfig._VALID_DICT_FIELDS:
            self._options[name].type = _mapping if name.endswith("_kwargs") else _mapping_or_file

    def parse_args_and_config(self, args: Iterable[str] | None = None, *_: Any, **__: Any) -> tuple[Any, ...]:
        """
        The three dataclasses that the arguments and the file named by `--config` give.

        Raises:
            FileNotFoundError: There is no such file.
            UsageError: An option is unknown, or its value has the wrong type.
            ValueError: Values do not fit each other.
        """
        config, words = _take_option("--config", list(args or []))
        values = self._read_config(Path(config)) if config is not None else []
        self._check_names(words)
        *parsed, rest = self.parse_args_into_dataclasses(
            args=values + words, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise UsageError(f"got {rest[0]!r} where an option was expected. Write --config FILE, or --option value.")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"argument --(\w+?)(?:/\S*)?: (.*)", message, re.DOTALL):
            name, problem = match.groups()
            if match := re.fullmatch(r"invalid choice: '(.*?)' \(choose from (.*)\)", problem):
                near = difflib.get_close_matches(match[1], choices := re.findall(r"'(.*?)'", match[2]))
                expected = f"Did you mean {' or '.join(near)}" if near else f"Expected one of {', '.join(choices)}"
                problem = f"got {match[1]!r}. {expected}{'?' if near else '.'}"
            elif match := re.fullmatch(
                r"(?:invalid \w+ value: '|Truthy value expected: got )(.*?)(?:'| but .*)", problem
            ):
                types = get_args(self._hints[name]) or (self._hints[name],)
                kinds = [kind for of, kind in _KINDS.items() if of in types]
                problem = f"got {match[1]!r}, expected {(kinds or ['another value'])[0]}."
            elif problem.startswith("expected "):
                problem = "the value is missing."
            raise UsageError(f"`{name}`: {problem}")
        message = re.sub(r"the following arguments are required: --(\w+).*", r"`\1` is missing.", message)
        raise UsageError(f"{message} `igpo train --help` lists the options.")

    def _read_config(self, path: Path) -> list[str]:
        """The options of a YAML file as words of a command line."""
        if not path.is_file():
            problem = "this is a directory" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"`--config`: {problem}: {path}. Expected a YAML file.")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
            where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
            raise UsageError(f"{where}: not YAML ({problem}). Expected lines `option: value`.") from error
        if not isinstance(config, dict):
            kind = "an empty file" if config is None else type(config).__name__
            raise UsageError(f"{path}: expected lines `option: value`, got {kind}.")
        environment = config.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise UsageError(f"{path}: `env` must have lines `NAME: value`, got {environment!r}.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        words = []
        for name, value in config.items():
            if name not in self._options:
                raise UsageError(f"{path}: unknown option `{name}`.{self._suggestion(str(name), '`')}")
            action, hint = self._options[name], str(self._hints[name])
            if isinstance(value, list) and value and action.nargs == "+":
                words += [f"--{name}", *map(_word, value)]
            elif value is None or value == [] or (isinstance(value, list | dict) and type(value).__name__ in hint):
                self.set_defaults(**{name: value})
                action.required = False
            elif isinstance(value, list | dict):
                raise UsageError(f"{path}: `{name}` is {value!r}, expected one value.")
            else:
                # In YAML 1.1, `no` is false.
                words.append(f"--{name}={'no' if value is False and name.endswith('_strategy') else _word(value)}")
        return words

    def _check_names(self, words: Sequence[str]) -> None:
        for word in words:
            name = word.partition("=")[0]
            if word.startswith("--") and name not in self._option_string_actions:
                raise UsageError(f"unknown option {name}.{self._suggestion(name[2:].replace('-', '_'), '--')}")

    def _suggestion(self, name: str, before: str) -> str:
        names = list(reversed(self._options))
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.7) or [
            each for each in names if name and (each.startswith(name) or name.startswith(each))
        ]
        quote = "`" if before == "`" else ""
        text = " or ".join(f"{before}{each}{quote}" for each in near[:2])
        return f" Did you mean {text}?" if text else " `igpo train --help-all` lists all options."

    def format_help(self, everything: bool = False) -> str:
        """Our options first, in groups; TRL's and transformers' only where `everything` is wanted."""
        groups = {
            "Data and search": [each.name for each in own_fields(ScriptArguments)],
            "IGPO": [each.name for each in own_fields(IGPOConfig, GRPOConfig)],
            **{title: names.split() for title, names in _SHOWN.items()},
        }
        if everything:
            shown = {name for names in groups.values() for name in names}
            groups["TRL and transformers"] = [name for name in reversed(self._options) if name not in shown]
        width = min(shutil.get_terminal_size().columns, 119)
        lines = [f"usage: {self.prog} {_USAGE}", "", *textwrap.wrap(_ABOUT, width)]

        def add(option: str, text: str) -> None:
            indent = " " * 6
            lines.extend([f"  {option}", *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)])

        lines += ["", "Options:"]
        for name, text in _OPTIONS.items():
            add(f"--{name}", text)
        for title, names in groups.items():
            lines += ["", f"{title}:"]
            for name in names:
                if (action := self._options.get(name)) is not None:
                    default = "" if action.default is None or action.required else f"  [{action.default!r}]"
                    add(f"--{name}{default}", action.help or "")
        return "\n".join(lines) + "\n"


def _mapping(text: str) -> str:
    try:
        if isinstance(json.loads(text), dict):
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'got {text!r}, expected JSON such as {{"name": "value"}}.')


def _mapping_or_file(text: str) -> str:
    return _mapping(text) if text.startswith("{") else text


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _take_option(name: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, and the other words."""
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
        if word == name:
            if i + 1 == len(words):
                raise UsageError(f"{name} needs a value, the path of a YAML file.")
            return words[i + 1], words[:i] + words[i + 2 :]
    return None, words
