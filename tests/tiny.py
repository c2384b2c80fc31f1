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

from architectures import ARCHITECTURES, COMMON, VOCABULARY
from prefopt.data.group import Completion, CompletionGroup
from prefopt.records import Source


def model_of(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; weights are large enough that context matters.

    Args:
        changes: To the arguments of its configuration.
    """
    what = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, what.config)(**{**what.arguments, **changes})
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


def letters_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A letter a token; `<pad>` is token 0, `<eos>` token 1."""
    letters = {c: i for i, c in enumerate(["<pad>", "<eos>", *string.ascii_letters, *" .,!?'\n"])}
    raw = Tokenizer(models.WordLevel(letters, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token=pad)


def save_tiny_model(folder: Path) -> None:
    """A tiny Llama in transformers' format whose tokenizer writes a letter a token."""
    tokenizer = letters_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**COMMON, "vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
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
