"""Tiny random models and groups that tests share."""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prefopt.data.group import Completion, CompletionGroup
from prefopt.records import Source

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}

# name -> (configuration class, arguments). Windows are shorter than the longest test sequence.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _COMMON),
    "Qwen2": ("Qwen2Config", _COMMON),
    "Qwen2 with windows": (
        "Qwen2Config",
        {**_COMMON, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "Mistral": ("MistralConfig", {**_COMMON, "sliding_window": None}),
    "Mistral with windows": ("MistralConfig", {**_COMMON, "sliding_window": 6}),
    "Mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 2": ("Gemma2Config", {**_COMMON, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3TextConfig", {**_COMMON, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "GPT-2": ("GPT2Config", _GPT2),
    "GPT-NeoX": ("GPTNeoXConfig", _NEOX),
    "Phi-3": ("Phi3Config", _COMMON),
    "OLMo-2": ("Olmo2Config", _COMMON),
    "Granite": ("GraniteConfig", {**_COMMON, "logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "Cohere": ("CohereConfig", {**_COMMON, "logit_scale": 0.25}),
}

# Models that cannot share a prefix: no pluggable attention, sinks, a recurrent state.
UNSHARABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "GPT-OSS": (
        "GptOssConfig",
        {**_COMMON, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "Mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


def model_of(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode; weights are large enough that context matters."""
    name, arguments = (ARCHITECTURES | UNSHARABLE)[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    result: PreTrainedModel = model.eval()
    return result


def completion(*ids: int, trainable: Sequence[bool] | None = None) -> Completion:
    mask = np.ones(len(ids), dtype=bool) if trainable is None else np.array(trainable)
    return Completion(np.array(ids, dtype=np.int32), mask)


def group(prompt: Sequence[int], *completions: Completion, row: int = 1, weight: float = 1.0) -> CompletionGroup:
    return CompletionGroup(np.array(prompt, dtype=np.int32), completions, Source("tiny.jsonl", row), weight)


def random_groups(lengths: Sequence[tuple[int, ...]], seed: int = 0) -> list[CompletionGroup]:
    """One group per (prompt length, completion length, ...)."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(1, VOCABULARY, n)]

    return [
        group(ids(prompt), *(completion(*ids(n)) for n in completions), row=row)
        for row, (prompt, *completions) in enumerate(lengths, start=1)
    ]


def save_tiny_model(folder: Path) -> None:
    """A tiny Llama in transformers' format whose tokenizer writes a letter a token."""
    letters = {c: i for i, c in enumerate(["<pad>", "<eos>", *string.ascii_letters, *" .,!?'\n"])}
    raw = Tokenizer(models.WordLevel(letters, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**_COMMON, "vocab_size": len(letters), "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(file: Path, rows: int) -> None:
    """Pairs in which "good" is preferred to "bad", no two alike."""
    rng = random.Random(0)
    lines = []
    for _ in range(rows):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        prompt = f"How is {word}?"
        chosen, rejected = f" It is good{'!' * rng.randint(1, 3)}", f" It is bad{'.' * rng.randint(1, 5)}"
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    file.write_text("\n".join(lines) + "\n")
