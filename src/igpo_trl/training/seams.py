"""
What the trainer overrides and calls inside TRL and transformers, and whether the installed versions still have it.

A *seam* is a function or a method whose signature no documentation promises. Each says which parameters it must take,
in their order, and what breaks without them. `tests/test_seams.py` also holds what signatures do not show.
"""

import functools
import importlib
import inspect
import warnings
from importlib.metadata import version
from typing import Any, NamedTuple

from packaging.version import Version

#: The oldest and the newest minor version of each package that tests of `make test-compat` were run with.
TESTED = {"trl": ("1.16", "1.16"), "transformers": ("5.13", "5.24")}


class Seam(NamedTuple):
    """
    A function of another package, and how it is called or overridden here.

    Attributes:
        place (`str`): module, and names inside it, with a colon between.
        parameters (`str`): the parameters that it must begin with, `self` left out; those after `*` are found by name.
            More may follow if they have defaults, or whatever they are after `...`, because all are passed on.
        use (`str`): a sentence: what depends on it.
    """

    place: str
    parameters: str
    use: str

    @property
    def name(self) -> str:
        module, _, name = self.place.partition(":")
        return f"{module.split('.')[0]}'s `{name}`"

    def problem(self) -> str | None:
        """What keeps the installed version from working here; `None` if nothing does."""
        module, _, path = self.place.partition(":")
        try:
            function: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return f"{self.name} does not exist (looked for in {module})"
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        ordered, _, named = self.parameters.replace("...", "").partition("*")
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wanted, by_name = ordered.replace(",", " ").split(), named.replace(",", " ").split()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        missing = [name for name in by_name if not takes_any and name not in {p.name for p in parameters}]
        demanded = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if p.name not in [*wanted, *by_name]
        ]
        passes_on = "..." in self.parameters
        if positional[: len(wanted)] == wanted and not missing and (passes_on or not demanded):
            return None
        got = ", ".join(p.name for p in parameters)
        return f"{self.name} takes ({got}), and ({self.parameters}) was expected"


_GRPO, _TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer", "transformers.trainer:Trainer"
SEAMS = (
    Seam(
        f"{_GRPO}.__init__",
        "model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, "
        "callbacks, optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory",
        "IGPOTrainer passes its arguments on in this order.",
    ),
    Seam(f"{_GRPO}._generate_and_score_completions", "inputs", "It makes a step, whose advantages are replaced."),
    Seam(f"{_GRPO}._generate", "prompts", "The KV cache is kept while it runs, and turns are found in its result."),
    Seam(
        f"{_GRPO}._generate_single_turn",
        "prompt_ids, images, multimodal_fields, num_generations",
        "Every turn is sampled through it, within the context.",
    ),
    Seam(
        f"{_GRPO}._tool_call_loop",
        "prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields",
        "The rollout loop runs in its place.",
    ),
    Seam(
        f"{_GRPO}._get_per_token_logps_and_entropies",
        "model, input_ids, attention_mask, logits_to_keep",
        "Forwards of the loss are run on real tokens, and beliefs are scored against their KV cache.",
    ),
    Seam(
        f"{_GRPO}._calculate_rewards",
        "inputs, prompts, completions, completion_ids_list",
        "Its result is the outcome of every rollout.",
    ),
    Seam(f"{_GRPO}._compute_loss", "model, inputs", "Ratios of whole turns are put into its inputs."),
    Seam(f"{_GRPO}.compute_loss", "model, inputs", "Metrics of the loss are weighed by tokens."),
    Seam(f"{_GRPO}.training_step", "model, inputs, num_items_in_batch", "The time of a step is measured around it."),
    Seam(f"{_GRPO}.log", "logs, start_time", "Metrics are reduced before it averages them."),
    Seam(f"{_GRPO}.create_model_card", "model_name, dataset_name, tags", "The card of a run takes its place."),
    Seam(f"{_TRAINER}.train", "resume_from_checkpoint", "It resumes from the last whole checkpoint."),
    Seam(
        f"{_TRAINER}._run_epoch",
        "... * epoch, epochs_trained, resume_from_checkpoint",
        "A finished run is kept from one more step, and a resumed one takes the order of its epoch.",
    ),
    Seam(f"{_TRAINER}._save_checkpoint", "model, trial", "A full disk while it saves is a clear error."),
    Seam(f"{_TRAINER}._save_rng_state", "output_dir", "Rollouts and running state are saved with it."),
    Seam(
        f"{_TRAINER}._load_from_checkpoint",
        "resume_from_checkpoint, model",
        "The trained one of several adapters is loaded after it.",
    ),
    Seam(f"{_TRAINER}._load_rng_state", "checkpoint", "Rollouts and running state are loaded after it."),
    Seam(f"{_GRPO}._get_train_sampler", "dataset", "A resumed run draws the order of its epoch from it."),
    Seam(f"{_TRAINER}.evaluate", "eval_dataset, ignore_keys, metric_key_prefix", "Metrics are averaged over sets."),
    Seam(f"{_TRAINER}.evaluation_loop", "dataloader, ... * metric_key_prefix", "What TRL gathered joins its metrics."),
    Seam(f"{_TRAINER}.save_model", "output_dir, _internal_call", "The card of a run is written with the model."),
    Seam(f"{_TRAINER}.push_to_hub", "commit_message, blocking, token, revision", "Records are left out of it."),
    Seam(f"{_TRAINER}.init_hf_repo", "token", "A repository that cannot be made costs no trained model."),
    Seam(f"{_TRAINER}._push_from_checkpoint", "checkpoint_folder", "Records are left out of it."),
    Seam("transformers.trainer:hf_api", "", "It is replaced during a push, which leaves out records."),
    Seam("trl.chat_template_utils:parse_response", "tokenizer, ids * prefix, tools", "It reads what a turn calls."),
    Seam("trl.chat_template_utils:add_response_schema", "processing_class", "It chooses how turns are parsed."),
    Seam("trl.chat_template_utils:supports_tool_calling", "processing_class", "It accepts unusual chat templates."),
    Seam(
        "trl.trainer.grpo_trainer:get_training_chat_template",
        "processing_class",
        "It is replaced while a trainer is made, so that edited chat templates are accepted.",
    ),
    Seam("trl.trainer.utils:create_model_from_path", "model_id", "It loads the base model of an adapter."),
    Seam("trl.trainer.utils:get_config_model_id", "config", "It names a model that is already loaded."),
    Seam(
        "transformers.utils.chat_parsing:parse_response",
        "text, response_template * prefix",
        "Chat templates are recognised by what it makes of their calls.",
    ),
    Seam(
        "transformers.utils.chat_parsing.response_templates:load_response_template",
        "spec",
        "It checks a response template that was set by hand.",
    ),
    Seam(
        "transformers.utils.chat_parsing.content_parsers:parse_content",
        "text, name, args",
        "It reads calls that a policy wrote in another family's form.",
    ),
    Seam("transformers.modeling_utils:AttentionInterface.register", "key, value", "Packed rows get their attention."),
    Seam("transformers:DynamicCache", "* config", "Beliefs and turns branch off KV caches."),
    Seam("transformers:DynamicCache.batch_select_indices", "indices", "The prompt of a group is prefilled once."),
)


@functools.cache
def check_seams() -> None:
    """
    Raise `ImportError` if a seam is not what it was; warn once of a version that no test has seen.

    Raises:
        `ImportError`: names each seam that has changed, what depends on it, and the versions to install.
    """
    installed = {package: version(package) for package in TESTED}
    have = " and ".join(f"{package} {number}" for package, number in installed.items())
    tested = " and ".join(
        f"{package} {old}" + (f" to {new}" if new != old else "") for package, (old, new) in TESTED.items()
    )
    pins = " ".join(f"'{package}=={new}.*'" for package, (_, new) in TESTED.items())
    broken = [f"{problem}. {seam.use}" for seam in SEAMS if (problem := seam.problem()) is not None]
    if broken:
        raise ImportError(
            f"IGPOTrainer overrides internals that have changed in {have}: {' '.join(broken)} It was tested with "
            f"{tested}. Install them with `pip install {pins}`, or a newer igpo-trl."
        )
    minors = {package: Version(".".join(number.split(".")[:2])) for package, number in installed.items()}
    if any(
        not Version(TESTED[package][0]) <= minor <= Version(TESTED[package][1]) for package, minor in minors.items()
    ):
        warnings.warn(
            f"{have} are installed, and igpo-trl was tested with {tested}. What it overrides has the same signatures, "
            "so training is likely to work; compare the first steps with what you expect. To be sure, install the "
            f"tested versions: `pip install {pins}`.",
            UserWarning,
            stacklevel=3,
        )
