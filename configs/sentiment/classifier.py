"""The truth of imdb.yaml: how sure a sentiment classifier is that prompt and completion together are positive.

CLASSIFIER names it, a folder or hub name of transformers: here the paper's. It stands in this file, whose content
is the fingerprint of the reward, so that another classifier is another truth. Start prefopt from the repository's
root.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

CLASSIFIER = "siebert/sentiment-roberta-large-english"
_BATCH = 64


@cache
def _classifier() -> tuple[Any, Any, int]:
    """Model, tokenizer, and the number of the positive class."""
    model = AutoModelForSequenceClassification.from_pretrained(
        CLASSIFIER, use_safetensors=True, trust_remote_code=False
    )
    labels = {str(label).lower(): number for number, label in model.config.id2label.items()}
    positive = labels.get("positive", labels.get("label_1"))
    if positive is None:
        raise ValueError(f"{CLASSIFIER} has the classes {', '.join(labels)}; expected one called POSITIVE")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), AutoTokenizer.from_pretrained(CLASSIFIER, trust_remote_code=False), positive


@torch.no_grad()
def positive(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Probability of the positive class, in [0, 1]; texts are cut at 512 tokens."""
    model, tokenizer, number = _classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    found: list[float] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        batch = tokenizer(part, padding=True, truncation=True, max_length=512, return_tensors="pt").to(model.device)
        found += model(**batch).logits.float().softmax(dim=-1)[:, number].tolist()
    return found
