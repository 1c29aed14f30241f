"""Branches off a trunk against plain forwards, on every architecture that is let pass; and the others are refused."""

import oracles
import pytest
import tiny
import torch
from test_beliefs import NATS, VOCABULARY, assert_beliefs, probe, ragged_batch, tokens
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from igpo_trl.beliefs import models as support
from igpo_trl.beliefs import packed_obstacle, packing, score_beliefs

WINDOW = {"sliding_window": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW}
USED = {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Model type, and what its config needs beside the shape that all have.
PACKED = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"head_dim": None}),
    "cohere2": ("cohere2", ALTERNATING),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", ALTERNATING),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", ALTERNATING),  # soft-capping
    "gemma2-tight-cap": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, **ALTERNATING}),
    "gemma3": ("gemma3_text", ALTERNATING),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "gpt2": ("gpt2", {"num_key_value_heads": None, "head_dim": None}),
    "gpt_neox": ("gpt_neox", {"head_dim": None}),
    "gpt_oss": ("gpt_oss", MOE | ALTERNATING),  # attention sinks
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", MOE),
    "helium": ("helium", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "llama": ("llama", {}),
    "ministral": ("ministral", ALTERNATING),
    "ministral3": ("ministral3", {}),
    "ministral3-window": ("ministral3", WINDOW),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", WINDOW),
    "mixtral": ("mixtral", MOE),
    "mixtral-window": ("mixtral", MOE | WINDOW),
    "nemotron": ("nemotron", {"head_dim": None}),
    "olmo": ("olmo", {"head_dim": None}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "olmo3": ("olmo3", {"head_dim": None, **ALTERNATING}),
    "olmoe": ("olmoe", {"head_dim": None, **MOE}),
    "phi": ("phi", {"head_dim": None}),
    "phi3": ("phi3", {"head_dim": None}),
    "phi3-window": ("phi3", {"head_dim": None, **WINDOW}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2-window": ("qwen2", {"head_dim": None, **USED}),
    "qwen2-all-window": ("qwen2", {"head_dim": None, **USED, "max_window_layers": 0}),
    "qwen2_moe": ("qwen2_moe", {"head_dim": None, "shared_expert_intermediate_size": 32, **MOE}),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", USED),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_moe-router": ("qwen3_moe", {"output_router_logits": True, **MOE}),
    "qwen3_moe-window": ("qwen3_moe", MOE | USED),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),  # NoPE layers
    "smollm3-window": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, **ALTERNATING}),
    "stablelm": ("stablelm", {"head_dim": None, "hidden_size": 64, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"head_dim": None}),
    "starcoder2-window": ("starcoder2", {"head_dim": None, **WINDOW}),
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
# State that a cache cannot branch, distances in the attention, or nobody has looked.
PER_TURN = {
    "bloom": ("bloom", {"num_key_value_heads": None, "head_dim": None}),  # alibi
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
    "jamba": ("jamba", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "llama4": ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 96}),
    "mamba": ("mamba", {"state_size": 8}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 4}),  # alibi
    "opt": ("opt", {}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_next": ("qwen3_next", MOE | DELTA | {"shared_expert_intermediate_size": 32}),
    "recurrent_gemma": ("recurrent_gemma", {}),
}


def make_model(model_type, changes, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    } | changes
    absent = [name for name in ("head_dim", "num_key_value_heads") if shape[name] is None]
    config = AutoConfig.for_model(model_type, **{k: v for k, v in shape.items() if k not in absent})
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far larger than is usual, so that probabilities differ
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in name:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model


@pytest.mark.parametrize("case", PACKED)
def test_packed_and_per_turn_equal_plain_forwards(case):
    model, batch = make_model(*PACKED[case]), ragged_batch()
    expected = oracles.beliefs(model, *batch)
    assert packed_obstacle(model) is None
    assert_beliefs(score_beliefs(model, *batch, method="packed"), expected)
    assert_beliefs(score_beliefs(model, *batch, method="per_turn"), expected)


@pytest.mark.parametrize("case", ["gemma2", "gpt_oss", "mistral-window", "qwen2-window", "qwen3_moe", "smollm3"])
def test_eager_attention_equals_plain_forwards(case):
    model, batch = make_model(*PACKED[case], attn_implementation="eager"), ragged_batch()
    assert_beliefs(score_beliefs(model, *batch, method="packed"), oracles.beliefs(model, *batch))


@pytest.mark.parametrize("case", PER_TURN)
def test_what_cannot_branch_is_scored_per_turn(case):
    model, batch = make_model(*PER_TURN[case]), ragged_batch()
    assert packed_obstacle(model)
    with pytest.raises(ValueError, match="Use 'auto' or 'per_turn'"):
        score_beliefs(model, *batch, method="packed")
    assert_beliefs(score_beliefs(model, *batch, method="auto"), oracles.beliefs(model, *batch))


def test_every_model_type_that_is_let_pass_is_tested():
    assert {model_type for model_type, _ in PACKED.values()} == (support.FULL | support.WINDOWED | support.LAYERED)
    windowed = {model_type for model_type, changes in PACKED.values() if changes.get("sliding_window")}
    assert windowed >= support.WINDOWED | support.LAYERED - {"qwen2_moe"}


@pytest.mark.parametrize("case", [case for case, (_, changes) in PACKED.items() if changes.get("sliding_window")])
def test_the_windows_matter(case):
    """With every past token in sight the beliefs are others: the tests above could see a window forgotten."""
    model_type, changes = PACKED[case]
    model, batch = make_model(model_type, changes), ragged_batch()
    wide = make_model(model_type, changes | {"sliding_window": 1000})
    apart = torch.tensor(oracles.beliefs(wide, *batch)[2]) - torch.tensor(oracles.beliefs(model, *batch)[2])
    assert apart.abs().max() > 100 * NATS


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_class_of_somebody_else_is_refused():
    from transformers import Qwen3ForCausalLM

    class Mine(Qwen3ForCausalLM):
        pass

    assert "Mine" in packed_obstacle(Mine(tiny.make_model("qwen3").config))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 32),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
)
def test_positions_that_change_with_the_length_are_packed_up_to_that_length(rope, limit):
    changes = {"rope_parameters": rope, "max_position_embeddings": 64 if "short_factor" in rope else limit}
    model = make_model("llama", changes)
    assert rope["rope_type"] in packed_obstacle(model)
    assert packed_obstacle(model, limit) is None
    assert packed_obstacle(model, limit + 1)
    short = [tokens(24)], [[6, 24]], [[probe(3, 2)]]
    assert_beliefs(score_beliefs(model, *short, method="packed"), oracles.beliefs(model, *short))
    with pytest.raises(ValueError, match=rope["rope_type"]):
        score_beliefs(model, *ragged_batch(), method="packed")


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.make_model("qwen3"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert "PROMPT_TUNING" in packed_obstacle(model)


def test_unknown_attention_is_refused():
    model = tiny.make_model("qwen3")
    model.config._attn_implementation = "paged|sdpa"
    assert "paged|sdpa" in packed_obstacle(model)


# --- how the model is run --------------------------------------------------------------------------------------------


def test_an_attention_without_masks_is_switched_for_the_probes_and_back(monkeypatch):
    # The kernel itself needs an accelerator.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", sdpa_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention", sdpa_mask)
    model, batch = tiny.make_model("qwen3", VOCABULARY, attn_implementation="sdpa"), ragged_batch()
    expected = oracles.beliefs(model, *batch)
    model.set_attn_implementation("flex_attention")
    weight, seen = model.lm_head.weight.data_ptr(), []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))

    assert_beliefs(score_beliefs(model, *batch, method="packed"), expected)
    assert seen == ["flex_attention", "sdpa"]  # trunk, probes
    assert model.config._attn_implementation == "flex_attention"
    assert model.lm_head.weight.data_ptr() == weight

    def fail(*_):
        if model.config._attn_implementation == "sdpa":
            raise MemoryError

    model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        score_beliefs(model, *batch, method="packed")
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("nodes", [1, 5, 1000])
@pytest.mark.parametrize("case", ["llama", "qwen2-window", "qwen3-window", "smollm3-window", "gpt2"])
def test_probes_in_any_number_of_forwards_equal_plain_forwards(monkeypatch, case, nodes):
    monkeypatch.setattr(packing, "_NODES", nodes)
    model, batch = make_model(*PACKED[case]), ragged_batch()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert_beliefs(score_beliefs(model, *batch, method="packed"), oracles.beliefs(model, *batch))
    # One of all trunks; then one of all probes, or as many as the row with the most probes needs.
    assert len(forwards) >= {1: 16, 5: 5, 1000: 2}[nodes]


def test_the_trunk_ends_with_the_last_keys():
    model, batch = tiny.make_model("qwen3", VOCABULARY), ragged_batch()
    expected = score_beliefs(model, *batch, method="packed")
    mlp, head = model.model.layers[-1].mlp.gate_proj, model.lm_head  # leaves: they may be hooked
    ran = []
    handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in (mlp, head)]
    assert_close(score_beliefs(model, *batch, method="packed"), expected)
    assert ran == [mlp, head]  # only for the probes

    # Whoever waits for the end of a forward gets to see it.
    ends = []
    handles.append(model.model.register_forward_hook(lambda *_: ends.append(1)))
    ran.clear()
    assert_close(score_beliefs(model, *batch, method="packed"), expected)
    assert ran == [mlp, head] * 2
    assert ends == [1, 1]


def assert_close(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, atol=NATS, rtol=0.0)
