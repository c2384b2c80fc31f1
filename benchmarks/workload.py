"""What every contestant of a benchmark is given: rows of known lengths, and models of known shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.data.group import Completion, CompletionGroup
from prefopt.records import Source

MIXES = ("180/330/270", "350/40/40", "800/200/200")
EOS, BETA = 1, 0.1
Pair = tuple[list[int], list[int], list[int]]

# vocabulary, width, feed-forward width, layers, heads, key-value heads: the shapes of SmolLM2-135M,
# Qwen2.5-0.5B and -1.5B, and Llama-2-7B, and one for two CPU cores. Weights are random.
SHAPES = {
    "15M": (32_000, 288, 768, 6, 6, 6),
    "135M": (49_152, 576, 1536, 30, 9, 3),
    "0.5B": (151_936, 896, 4864, 24, 14, 2),
    "1.5B": (151_936, 1536, 8960, 28, 12, 2),
    "7B": (32_000, 4096, 11008, 32, 32, 32),
}


def rows(mix: str, pairs: int, vocabulary: int) -> list[Pair]:
    """Log-normal lengths (sigma 0.6) around the mix's means; completions end in EOS."""
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (int(n) for n in mix.split("/"))

    def ids(mean: int) -> list[int]:
        length = max(2, round(mean * float(rng.lognormal(-0.18, 0.6))))
        return [int(i) for i in rng.integers(10, vocabulary, length)]

    return [(ids(prompt), [*ids(chosen), EOS], [*ids(rejected), EOS]) for _ in range(pairs)]


def rows_of_file(file: Path, tokenizer: Path, pairs: int, vocabulary: int) -> list[Pair]:
    """The lengths of a real file's pairs under a real tokenizer, evenly spread over the file, with random ids."""
    from transformers import AutoTokenizer

    from prefopt.data.audit import Audit
    from prefopt.data.read import read_records
    from prefopt.data.tokenize import Renderer, tokenize

    audit = Audit()
    renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer))
    groups = list(
        tokenize(read_records([str(file)], audit=audit), renderer, max_length=2048, max_prompt_length=1024, audit=audit)
    )
    rng = np.random.default_rng(0)
    picked = [groups[int(i)] for i in np.linspace(0, len(groups) - 1, pairs)]
    rng.shuffle(picked)

    def ids(length: int) -> list[int]:
        return [int(i) for i in rng.integers(10, vocabulary, length)]

    return [
        (ids(len(g.prompt_ids)), *([*ids(len(c.ids) - 1), EOS] for c in g.completions))  # type: ignore[misc]
        for g in picked
    ]


def words(vocabulary: int) -> tuple[PreTrainedTokenizerFast, Callable[[list[int]], str]]:
    """A tokenizer of words of one width, so that none is part of another, and the text of ids under it."""
    raw = Tokenizer(models.WordLevel({f"t{i:06}": i for i in range(vocabulary)}, unk_token="t000000"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"t{EOS:06}", pad_token="t000000")
    return tokenizer, lambda ids: " ".join(f"t{i:06}" for i in ids)


def groups_of(pairs: list[Pair]) -> list[CompletionGroup]:
    """The pairs as prefopt keeps them, every completion token scored."""

    def side(ids: list[int]) -> Completion:
        return Completion(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))

    return [
        CompletionGroup(np.array(p, dtype=np.int32), (side(c), side(r)), Source("rows", i))
        for i, (p, c, r) in enumerate(pairs)
    ]


def model(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Llama-like, the same random weights for everybody."""
    vocabulary, width, feed_forward, layers, heads, kv_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with torch.device(device):
        made: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    return made


def padded_logprobs(policy: torch.nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
    """What plain code does: chosen rows, then rejected rows, padded to the longest; full logits; a sum a sequence."""
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    longest = max(len(p) + len(c) for p, c in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (p, c) in enumerate(sequences):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        mask[i, : len(p) + len(c)] = 1
        scored[i, len(p) : len(p) + len(c)] = 1
    device = next(policy.parameters()).device
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    picked = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    total: torch.Tensor = (picked * scored[:, 1:]).sum(1)
    return total


def useful_flops(shape: str, pairs: list[Pair]) -> float:
    """FLOPs of a training step on `pairs` that no exact method can leave out: prompt once, no padding, scored head.

    6 per parameter of the blocks and token, 6 per weight of the head and scored token, and attention's
    12 per layer, width and (query, key) pair.
    """
    vocabulary, width, feed_forward, layers, heads, kv_heads = SHAPES[shape]
    block = width * width * (2 + 2 * kv_heads / heads) + 3 * width * feed_forward
    total = 0.0
    for p, c, r in ((len(p), len(c), len(r)) for p, c, r in pairs):
        seen = (p + c) ** 2 / 2 + r * p + r * r / 2
        total += 6 * layers * block * (p + c + r) + 6 * vocabulary * width * (c + r) + 12 * layers * width * seen
    return total


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """The rate the device really reaches on a large product, FLOP/s: median of 10."""
    import statistics
    import time

    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return float(2 * size**3 / statistics.median(once() for _ in range(10)))
