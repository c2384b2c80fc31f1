"""Tiny tokenizers with hand-made vocabularies, and chat templates in well-known styles.

Every word given becomes one token (with its leading space, where it has one); all else falls
apart into single characters or bytes. Nothing is trained, so tests can name every token.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = [
    "CHATML",
    "GEMMA",
    "LLAMA2",
    "LLAMA3",
    "MISTRAL",
    "QWEN3",
    "byte_level",
    "sentencepiece_like",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The last reply gets an empty thinking block, earlier ones lose theirs.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set thought = '' %}{% set said = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system text stands in the LAST user turn, so earlier turns change as later ones follow.
MISTRAL = (
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if s else messages %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {% if s and loop.index0 >= turns | length - 2 %}{{ s + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def _vocabulary(alphabet: Sequence[str], words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens, and merges that build each word from the left."""
    tokens, merges = list(alphabet), list[tuple[str, str]]()
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(pair)
    return tokens, merges


def _wrap(
    core: Tokenizer, specials: Sequence[str], bos: str | None, eos: str | None, adds_bos: bool, template: str | None
) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if adds_bos:
        assert bos is not None
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    wrapped.chat_template = template
    return wrapped


def byte_level(
    *words: str,
    specials: Sequence[str] = ("<|endoftext|>",),
    bos: str | None = None,
    eos: str | None = "<|endoftext|>",
    adds_bos: bool = False,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, Llama-3 and Qwen; a space is written "Ġ", a newline "Ċ" in `words`."""
    tokens, merges = _vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _wrap(core, specials, bos, eos, adds_bos, template)


def sentencepiece_like(
    *words: str,
    specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    adds_bos: bool = True,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """BPE as in Llama-2: a space is "▁" and one is put in front of every text; bytes as a fallback."""
    alphabet = [*specials, *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    tokens, merges = _vocabulary(alphabet, words)
    core = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(core, specials, bos, eos, adds_bos, template)
