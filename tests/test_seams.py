"""
Contracts with TRL and transformers: each failure says in one sentence what has changed and what depends on it.

`make test-compat` runs them with the oldest and the newest versions of both.
"""

import inspect
import re
import tomllib
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
import trl
import trl.chat_template_utils as templates
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import DynamicCache, Trainer
from transformers.cache_utils import DynamicLayer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import GRPOConfig, GRPOTrainer

from igpo_trl.beliefs.models import cache_argument
from igpo_trl.rewards import answer_reward
from igpo_trl.training import seams
from igpo_trl.training.seams import SEAMS, Seam, check_seams


@pytest.fixture
def fresh():
    """The check runs once in a process: here once in a test."""
    check_seams.cache_clear()
    yield
    check_seams.cache_clear()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.place.rpartition(":")[2])
def test_signature(seam):
    problem = seam.problem()
    assert problem is None, f"{problem}. {seam.use}"


# --- what signatures do not show -------------------------------------------------------------------------------------


class Watched(tiny.Scripted, GRPOTrainer):
    """TRL's trainer alone, which keeps what its methods return and what they call each other with."""

    scripts = [[tiny.call("Paris"), tiny.answer("Paris")], [tiny.answer("Rome")]]

    def __init__(self, *args, **kwargs):
        self.seen = {}
        super().__init__(*args, **kwargs)
        for name in (
            *("_generate_and_score_completions", "_generate", "_tool_call_loop", "_calculate_rewards"),
            *("_get_per_token_logps_and_entropies", "_compute_loss"),
        ):
            setattr(self, name, self.watch(name, getattr(self, name)))

    def watch(self, name, method):
        def watched(*args, **kwargs):
            result = method(*args, **kwargs)
            self.seen[name] = SimpleNamespace(args=args, kwargs=kwargs, result=result)
            if name == "_generate_and_score_completions":  # they are emptied by the log
                self.seen["metrics"] = {key: list(values) for key, values in self._metrics["train"].items()}
                self.seen["logs"] = {key: len(values) for key, values in self._logs.items()}
            return result

        return watched


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """A step of TRL's own trainer with a tool, two optimizer steps on its rollouts."""
    folder = tmp_path_factory.mktemp("grpo")
    trainer = tiny.make_trainer(
        Watched, GRPOConfig, folder, reward_funcs=answer_reward, max_steps=2, num_iterations=2, log_completions=True,
        num_completions_to_print=0,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_tool_loop_returns_seven_lists(grpo):
    seen = grpo.seen["_tool_call_loop"]
    assert len(seen.args) == 7 and not seen.kwargs, "TRL calls `_tool_call_loop` with other arguments."
    assert len(seen.result) == 7, "`_tool_call_loop` returns another number of values than RolloutLoop's replacement."
    mask, completions, ids, logprobs, calls, failures, images = seen.result
    assert [len(m) for m in mask] == [len(i) for i in ids], "The tool mask no longer has an entry per token."
    assert set(mask[0]) == {0, 1} and calls == 2 and failures == 0, "The tool mask or the counts mean something else."
    assert logprobs is None and images == [[]] * 4, "Log-probabilities or images of a text rollout have another form."
    assert completions[0][0]["role"] == "assistant", "Completions are no longer lists of messages."


def test_generate_returns_ids_and_mask_first(grpo):
    result = grpo.seen["_generate"].result
    prompt_ids, completion_ids, mask, _, _, extra, *_ = result
    assert len(prompt_ids) == len(completion_ids) == len(mask) == 4, "`_generate` returns its lists in another order."
    assert isinstance(extra, dict), "The sixth value of `_generate` is no longer the dict of extra fields."


def test_batch_has_the_keys_that_are_read(grpo):
    output = grpo.seen["_generate_and_score_completions"].result
    needed = {"prompt_ids", "completion_ids", "completion_mask", "tool_mask", "advantages", "old_per_token_logps"}
    assert needed <= set(output), f"The batch of TRL has lost {sorted(needed - set(output))}."
    assert output["advantages"].shape == (4,), "TRL's own advantages are no longer one per rollout."
    assert output["completion_ids"].shape == output["tool_mask"].shape, "The tool mask has another shape."


def test_loss_takes_an_advantage_per_token(grpo):
    model, inputs = grpo.seen["_compute_loss"].args
    grpo.current_gradient_accumulation_steps = 1
    per_rollout = GRPOTrainer._compute_loss(grpo, model, dict(inputs))
    spread = inputs["advantages"][:, None].expand_as(inputs["completion_ids"])
    per_token = GRPOTrainer._compute_loss(grpo, model, {**inputs, "advantages": spread})
    assert torch.equal(per_rollout, per_token), "`_compute_loss` no longer takes advantages of shape (B, T)."


def test_rewards_are_those_of_all_functions(grpo):
    rewards = grpo.seen["_calculate_rewards"].result
    assert rewards.shape == (4, 1), "`_calculate_rewards` no longer returns (rollouts, functions)."


def test_log_probs_come_first_and_from_the_fused_head(grpo):
    seen = grpo.seen["_get_per_token_logps_and_entropies"]
    log_probs, *others = seen.result
    width = grpo.seen["_generate_and_score_completions"].result["completion_ids"].shape[1]
    assert log_probs.shape == (4, width), "Log-probabilities no longer come first, one per completion token."
    assert len(others) == 2, "`_get_per_token_logps_and_entropies` returns another number of values."
    model, ids, mask, keep = seen.args[:4]
    called = []
    grpo._get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies.__get__(grpo)
    grpo._get_per_token_logps_and_entropies(lambda **inputs: called.append(inputs) or model(**inputs), ids, mask, keep)
    assert set(called[0]) == {"input_ids", "attention_mask", "labels", "fused_lm_head"}, (
        "TRL calls its model with other arguments than those that SampledTokensModel replaces."
    )
    hidden = ids.shape[1]
    output = model(input_ids=ids[:1], attention_mask=mask[:1], shift_labels=ids[:1, :hidden], fused_lm_head=True)
    assert hasattr(output, "log_probs") and hasattr(output, "entropy"), "The fused head no longer returns these."


def test_state_that_is_read_between_the_hooks(grpo):
    for name in (
        *("_tokenizer", "_dist", "_metrics", "_logs", "_pending_extra_logs", "_sync_tool_dicts", "_async_tool_dicts"),
        *("tools", "environments", "eos_token_ids", "chat_template", "chat_template_kwargs", "generation_config"),
        *("generation_kwargs", "reward_weights", "reward_func_names", "max_tool_calling_iterations", "rollout_func"),
        *("num_generations", "num_generations_eval", "num_iterations", "max_completion_length", "model_wrapped"),
        *("use_vllm", "use_transformers_continuous_batching", "importance_sampling_level", "ref_model"),
        *("num_completions_to_print", "log_completions"),
        *("_step", "_buffered_inputs", "_tr_loss", "_globalstep_last_logged"),  # checkpoints hold these
    ):
        assert hasattr(grpo, name), f"GRPOTrainer has no attribute `{name}` any more, which IGPOTrainer reads."
    for name in ("is_zero3", "is_fsdp"):
        assert hasattr(grpo._dist, name), f"TRL no longer says in `_dist.{name}` whether parameters are sharded."
    assert {"prompt", "completion", "advantages", "extra"} <= set(grpo.seen["logs"]), "TRL's table lost a column."


def test_metrics_whose_weights_are_known(grpo):
    expected = {
        *(
            "reward",
            "reward_std",
            "rewards/answer_reward/mean",
            "completions/clipped_ratio",
            "completions/mean_length",
        ),
        *("completions/mean_terminated_length", "tools/call_frequency", "tools/failure_frequency"),
    }
    missing = expected - set(grpo.seen["metrics"])
    assert not missing, f"TRL logs {sorted(missing)} under another name, and its weight is lost."


def test_old_log_probs_are_computed_under_the_known_condition():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    condition = r"generate_every = self\.args\.steps_per_generation \* self\.num_iterations.*"
    condition += r"gradient_accumulation_steps % generate_every != 0 or \(\s*self\.use_vllm and "
    assert re.search(condition, source, re.DOTALL), (
        "TRL decides in another way whether old log-probabilities are computed: `make_step` has to follow."
    )


@pytest.mark.parametrize("family", "qwen3 qwen3_5 nemotron_3 glm4moe llama3 gptoss lfm2_2_5 gemma4".split())
def test_response_template_of_a_family(family):
    template = getattr(templates, f"{family}_template", None)
    assert isinstance(template, dict), f"TRL no longer has `{family}_template`, which parses calls of this family."


def test_cache_layers_can_be_gathered():
    cache = DynamicCache(config=tiny.make_model("qwen3").config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2, "A plain cache has layers of another class."
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    assert cache.layers[0].keys.shape == (2, 1, 3, 4), "A layer of a KV cache keeps its keys elsewhere."
    assert cache.get_seq_length() == 3, "The length of a KV cache is counted in another way."


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2"])
def test_models_call_their_cache_by_a_known_name(family):
    model = tiny.make_model(family).eval()
    name, parameters = cache_argument(model), inspect.signature(type(model).forward).parameters
    assert name in parameters, "Models call their KV cache neither `cache` nor `past_key_values`."
    cache = DynamicCache()
    output = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 3, "A model no longer fills the KV cache that it is given."
    assert getattr(output, name) is cache, "The output no longer has the KV cache under the name of the argument."
    mask = torch.ones(1, 4, dtype=torch.long)
    ids = torch.tensor([[1, 2, 3, 4]])
    longer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **{name: cache})
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert torch.equal(longer, plain), "`generate` no longer continues from the KV cache that it is given."


def test_attention_can_be_replaced():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    parameters = inspect.signature(getattr(attend, "func", attend)).parameters
    assert "query" in parameters and "attention_mask" in parameters, "The attention functions take other arguments."


def test_trainer_stops_where_a_callback_asks():
    source = inspect.getsource(Trainer._inner_training_loop)
    assert "_run_epoch" in source and "should_training_stop" in source, (
        "The training loop no longer runs epochs through `_run_epoch`: a finished run would take one more step."
    )
    assert "tensorboard" in INTEGRATION_TO_CALLBACK, "The names of trackers are kept elsewhere."


# --- the check at the start ------------------------------------------------------------------------------------------


def test_a_changed_seam_is_an_error_that_names_it(fresh, monkeypatch):
    def _tool_call_loop(self, prompts, completions):
        raise AssertionError

    monkeypatch.setattr(GRPOTrainer, "_tool_call_loop", _tool_call_loop)
    monkeypatch.delattr(templates, "parse_response")
    with pytest.raises(ImportError) as error:
        check_seams()
    text = str(error.value)
    assert "trl's `GRPOTrainer._tool_call_loop` takes (prompts, completions), and (prompts, prompt_ids," in text
    assert "The rollout loop runs in its place." in text
    assert "trl's `parse_response` does not exist (looked for in trl.chat_template_utils)" in text
    assert f"trl {trl.__version__} and transformers {transformers.__version__}" in text
    assert "pip install 'trl==" in text


@pytest.mark.parametrize(
    ("parameters", "accepted"),
    [
        ("text, response_template", True),
        ("text, response_template * prefix", True),
        ("response_template, text", False),
        ("text", False),  # the second has no default
        ("text, response_template * images", False),
        ("text, ...", True),
    ],
)
def test_signatures_that_are_compatible(parameters, accepted):
    seam = Seam("transformers.utils.chat_parsing:parse_response", parameters, "")
    assert (seam.problem() is None) is accepted


@pytest.mark.parametrize(("package", "number"), [("trl", "1.99.0.dev0"), ("transformers", "5.98.1")])
def test_an_untested_minor_is_a_warning_once(fresh, monkeypatch, recwarn, package, number):
    real = seams.version
    monkeypatch.setattr(seams, "version", lambda name: number if name == package else real(name))
    check_seams()
    check_seams()
    (warning,) = recwarn
    text = str(warning.message)
    assert f"{package} {number}" in text and "was tested with trl 1.16 and transformers 5.13 to 5." in text
    assert "pip install 'trl==" in text


def test_tested_versions_agree_with_what_is_declared(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    makefile = (repository / "Makefile").read_text()
    pins = (repository / "constraints.txt").read_text()
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in seams.TESTED:
            oldest, newest = seams.TESTED[requirement.name]
            assert requirement.specifier.contains(f"{oldest}.0")
            assert not requirement.specifier.contains(f"{oldest.split('.')[0]}.{int(oldest.split('.')[1]) - 1}.99")
            assert requirement.specifier.contains(f"{newest.split('.')[0]}.{int(newest.split('.')[1]) + 1}.0")
            assert re.search(rf"^oldest = .*\b{requirement.name}=={oldest}\.0\b", makefile, re.MULTILINE)
            (pinned,) = re.findall(rf"^{requirement.name}==(.*)$", pins, re.MULTILINE)
            assert Version(oldest) <= Version(pinned) < Version(f"{newest}.9999")
