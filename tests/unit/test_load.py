"""What is no model, or no safe one, is refused by name before anything loads; what is one loads and saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.errors import ConfigError, ModelError
from prefopt.model.load import (
    add_lora,
    load_model,
    load_reference,
    load_tokenizer,
    merge,
    save_model,
    weights_fingerprint,
)
from tiny import save_tiny_model

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
