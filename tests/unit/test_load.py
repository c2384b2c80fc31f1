"""What is no model, or no safe one, is refused by name before anything loads; what is one loads and saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import peft_warnings
from prefopt.model.load import (
    LoadedModel,
    add_lora,
    eos_ids,
    load_model,
    load_reference,
    load_tokenizer,
    max_positions,
    merge,
    row_positions,
    save_model,
    weights_fingerprint,
)
from tiny import model_of, save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path) -> None:
    load_model(str(path), dtype=torch.float32, device=CPU)


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    return caught.value.message()


def test_a_missing_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    assert "no such model folder" in refused(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no model" in refused(tmp_path / "empty")


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="neither a folder here nor reachable"):
        load_model("nobody/nothing-here", dtype=torch.float32, device=CPU)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(folder)
    assert "pickle" in message and "pytorch_model.bin" in message and "save_pretrained" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_is_refused(folder: Path, name: str) -> None:
    edit(folder / name, auto_map={"AutoModel": "evil.Model"})
    message = refused(folder)
    assert "code of its own" in message and name in message


def test_nested_trust_remote_code_is_refused(folder: Path) -> None:
    edit(folder / "config.json", text_config={"deep": [{"trust_remote_code": True}]})
    assert "code of its own" in refused(folder)


def test_unknown_and_unfit_kinds(folder: Path) -> None:
    edit(folder / "config.json", model_type="martian")
    assert "'martian'" in refused(folder)
    edit(folder / "config.json", model_type="t5")
    assert "not a causal language model" in refused(folder)


def test_cut_damaged_and_missing_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "cut or damaged" in refused(folder)
    weights.write_bytes(b"not safetensors at all")
    assert "damaged" in refused(folder)
    weights.unlink()
    assert "no weights" in refused(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard-1.safetensors"}}))
    assert "shard-1.safetensors" in refused(folder)


def test_a_layer_without_weights_is_named(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)
    assert "model.layers.2" in refused(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refused(folder)


def test_fingerprints_follow_content_alone(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    edit(copy / "config.json", transformers_version="0.0.1")
    assert weights_fingerprint(copy) == weights_fingerprint(folder)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert weights_fingerprint(copy) != weights_fingerprint(folder)


def test_lora_saves_loads_merges_and_names_unknown_layers(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(folder), dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match="q_proj"):
        add_lora(loaded.model, rank=2, alpha=2, dropout=0.0, targets=("w_q",), seed=0)
    adapted = add_lora(loaded.model, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    ids = torch.tensor([[5, 6, 7, 8]])
    truth = adapted(ids).logits
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    assert "<eos>" in load_tokenizer(str(tmp_path / "adapter")).get_vocab()
    merged = load_model(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(merged.model(ids).logits, truth)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, truth)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, truth)
    with pytest.raises(ModelError, match="not empty"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ModelError, match="no adapter"):
        merge(folder, tmp_path / "again")


def test_a_reference_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    policy = load_model(str(folder), dtype=torch.float32, device=CPU)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a": 2', '"\\u00e4": 2'))
    with pytest.raises(ModelError, match="different vocabularies"):
        load_reference(str(other), policy, torch.float32, CPU)


IDS = torch.tensor([[5, 6, 7, 8]])


def adapted(loaded: LoadedModel, shift: float) -> PeftModel:
    """A LoRA adapter that does something."""
    model = add_lora(loaded.model, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(shift)
    return model


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    loaded = load_model(str(folder), dtype=torch.float32, device=CPU)
    save_model(adapted(loaded, 0.2), loaded.tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_trained_on_an_adapter_keeps_both(adapter: Path, tmp_path: Path) -> None:
    loaded = load_model(str(adapter), dtype=torch.float32, device=CPU)
    before = loaded.model(IDS).logits
    model = adapted(loaded, 0.1)
    truth = model(IDS).logits
    assert not torch.allclose(truth, before, atol=1e-3)
    save_model(model, loaded.tokenizer, tmp_path / "second")
    torch.testing.assert_close(model(IDS).logits, truth, rtol=0, atol=0)
    again = load_model(str(tmp_path / "second"), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(again.model(IDS).logits, truth)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "second")(IDS).logits, truth)


def test_an_adapter_names_its_base_from_wherever_it_was_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    loaded = load_model("model", dtype=torch.float32, device=CPU)
    save_model(adapted(loaded, 0.2), loaded.tokenizer, tmp_path / "adapter")
    monkeypatch.chdir("/")
    load(tmp_path / "adapter")


def test_an_adapter_as_pickle_is_refused_whatever_lies_beside_it(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    assert "adapter has no weights" in refused(adapter)


def test_an_adapter_that_does_not_fit(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    gone = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != gone}, adapter / "adapter_model.safetensors")
    assert gone.removesuffix(".weight") in refused(adapter)
    save_file(weights, adapter / "adapter_model.safetensors")
    edit(adapter / "adapter_config.json", r=5)
    assert "size mismatch" in refused(adapter)
    edit(adapter / "adapter_config.json", r=2, target_modules=["w_q"])
    assert "w_q" in refused(adapter)
    edit(adapter / "adapter_config.json", peft_type="PREFIX_TUNING")
    assert "'PREFIX_TUNING'" in refused(adapter)


def test_an_adapter_without_a_base(folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # no name is not the folder one happens to stand in
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "base model is not here" in refused(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path="./gone")
    assert "'./gone'" in refused(adapter)


def test_adapters_go_on_gpt2_layers_and_on_the_head_only_if_named() -> None:
    add_lora(model_of("GPT-2"), rank=2, alpha=2, dropout=0.0, targets=("c_attn",), seed=0)
    names = [
        n for n, _ in add_lora(model_of("Llama"), rank=2, alpha=2, dropout=0.0, targets=None, seed=0).named_modules()
    ]
    assert any("q_proj.lora_A" in n for n in names) and not any("lm_head.lora_A" in n for n in names)


def on_the_head(loaded: LoadedModel, shift: float) -> PeftModel:
    model = add_lora(loaded.model, rank=2, alpha=2, dropout=0.0, targets=("q_proj", "lm_head"), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(shift)
    return model


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(folder), dtype=torch.float32, device=CPU)
    embedding = loaded.model.get_input_embeddings().state_dict()["weight"]
    assert loaded.model.config.tie_word_embeddings
    model = on_the_head(loaded, 0.2)
    truth = model(IDS).logits
    save_model(model, loaded.tokenizer, tmp_path / "adapter")
    with peft_warnings():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(plain(IDS).logits, truth)
    again = load_model(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(again.model(IDS).logits, truth)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, truth)
    for whole in (again.model, merged):
        torch.testing.assert_close(whole.get_input_embeddings().weight, embedding, rtol=0, atol=0)
        assert not whole.config.tie_word_embeddings


def test_an_adapter_on_the_tied_head_of_a_merged_model_is_saved_merged(adapter: Path, tmp_path: Path) -> None:
    loaded = load_model(str(adapter), dtype=torch.float32, device=CPU)  # stands in no folder
    assert loaded.model.config.tie_word_embeddings
    model = on_the_head(loaded, 0.3)
    truth = model(IDS).logits
    save_model(model, loaded.tokenizer, tmp_path / "second")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "second")(IDS).logits, truth)
    torch.testing.assert_close(model(IDS).logits, truth, rtol=0, atol=0)
    assert loaded.model.config.tie_word_embeddings


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    assert "model.layers.0.mlp.down_proj.weight (32, 48) instead of (32, 64)" in refused(folder)


def test_an_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bert")
    assert "not a causal language model" in refused(tmp_path / "bert")
    edit(tmp_path / "bert" / "config.json", is_decoder=True)
    load(tmp_path / "bert")


def test_a_folder_does_not_choose_where_attention_comes_from(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="kernels-community/flash-attn")
    loaded = load_model(str(folder), dtype=torch.float32, device=CPU)
    assert loaded.model.config._attn_implementation == "sdpa"


def test_what_transformers_cannot_read_is_explained(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    for damaged in (b"{", b'{"version": "1.0"}', whole.replace(b'"WordLevel"', b'"Martian"')):
        (folder / "tokenizer.json").write_bytes(damaged)
        assert "tokenizer cannot be loaded" in refused(folder)
    (folder / "tokenizer.json").write_bytes(whole)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights.replace(b'"F32"', b'"F99"', 1))
    assert "F99" in refused(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "model.safetensors" in refused(folder)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert f"token id {len(tokenizer) - 1}" in refused(folder)


def test_every_end_of_text_is_known(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    edit(folder / "generation_config.json", eos_token_id=[3, 4])
    assert eos_ids(str(folder), tokenizer) == {1, 3, 4}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="no JSON"):
        eos_ids(str(folder), tokenizer)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[5])
    assert eos_ids(str(folder), tokenizer) == {1, 5}


def test_rows_stay_where_one_does_not_change_another() -> None:
    """Beyond the original length LongRoPE takes other frequencies for the whole batch."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = model_of("Phi-3").config
    assert row_positions(config) == max_positions(config) == 128
    config.rope_parameters = longrope
    assert (row_positions(config), max_positions(config)) == (64, 128)
