"""Reward models: a causal LM's backbone with a linear head, read at a completion's last token.

In transformers' terms a sequence classifier with one label, whose folder loads there and gives the
same logits. transformers takes the rightmost token that is not `pad_token_id` for the last one, so
that id is one no text ends with. Its head has no bias: the shift that puts good completions at zero
stands in config.json as `reward_bias`, and reward = logit + reward_bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from prefopt.data.audit import Audit
from prefopt.data.bins import batches_by_length
from prefopt.data.feed import scored
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.tokenize import Renderer
from prefopt.errors import ModelError, RewardError
from prefopt.model.load import LoadedModel, eos_ids, load_model, row_positions, sliding_window
from prefopt.model.logprobs import Path, plain_attention, plain_model, sequence_ids, set_attention, target_hidden
from prefopt.model.paths import PathChoice, first_agreeing
from prefopt.records import Content, Message, Ranking, Source

__all__ = [
    "RewardModel",
    "choose_score_path",
    "load_reward_model",
    "sequence_scores",
    "to_reward_model",
    "transformers_scores",
]

_PADS = ("<|pad|>", "<|reward_pad|>")
_SCORE_TOKENS = 8192  # of a batch that is only scored: enough to keep a device busy, and no logits are held
_LONGEST_TRIAL = 1024  # tokens that are tried out on a model with windows

# Largest difference of a score to transformers' own, as a share of |hidden state| * |head|. float32: orders
# below what any layout mistake makes; bfloat16: 8 bits of mantissa.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one label, and everything that turns text into its input.

    Attributes:
        model: Gives the logits; transformers' own class, ready to score.
        path: How batches are laid out for it (`model.paths`).
        bias: What is added to a logit: `reward_bias` of the configuration, else 0.
        fingerprint, tokenizer_fingerprint: Content hashes of what it was loaded from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    path: Path
    bias: float
    fingerprint: str
    tokenizer_fingerprint: str

    def score(self, prompts: Sequence[Content], completions: Sequence[Content]) -> Float64[np.ndarray, " completions"]:
        """Reward of each completion of the prompt beside it: logit + bias.

        A completion is scored as a finished one, its end of turn behind it. Equal prompts are computed once.

        Args:
            completions: Text, also behind a prompt that is a conversation; or the messages that continue one.

        Raises:
            RewardError: a text that cannot be written in the model's template, or too long for the model.
        """
        of_prompt: dict[Content, list[int]] = {}
        for i, (prompt, _) in enumerate(zip(prompts, completions, strict=True)):
            of_prompt.setdefault(prompt, []).append(i)
        members = list(of_prompt.values())
        records = [
            _record(prompt, [completions[i] for i in own], number)
            for number, (prompt, own) in enumerate(of_prompt.items())
        ]
        audit = Audit()
        groups = list(self.renderer.groups(records, audit))
        if audit.refused:
            finding = next(f for f in audit.findings if f.state == "refused")
            raise _unreadable(records[finding.source.row], f"{finding.reason}: {finding.detail}")
        limit = row_positions(self.model.config)
        found = np.empty(len(prompts))
        for group in groups:
            longest = len(group.prompt_ids) + max(len(c.ids) for c in group.completions)
            if limit is not None and longest > limit:
                raise _unreadable(records[group.source.row], f"{longest:,} tokens, and the model holds {limit:,}")

        @torch.no_grad()
        def score(batch: PackedBatch) -> Tensor:
            return sequence_scores(self.model, batch, self.path)

        for batch, results in scored(batches_by_length(groups, _SCORE_TOKENS), score, self.model.device):
            own = [i for group in batch.groups for i in members[group.source.row]]
            found[own] = results.numpy() + self.bias
        return found


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    template: Literal["auto", "chat", "plain"] = "auto",
) -> RewardModel:
    """Load a reward model from a folder, a run folder of `prefopt reward`, or a hub name.

    Args:
        template: How conversations are written; auto: as in training.

    Raises:
        ModelError: as `load_model`; a language model, more labels than one, or a way of scoring that is not known.
    """
    loaded = load_model(path, dtype=dtype, device=device, kind="reward")
    head = getattr(loaded.model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(
            "The reward model's head is not a linear layer on the last token.",
            where=path,
            got=type(head).__name__,
            expected="a linear layer called score, as transformers' classifiers on decoders have",
        )
    config = loaded.model.config
    return RewardModel(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        renderer=Renderer(
            loaded.tokenizer,
            template=getattr(config, "reward_template", "auto") if template == "auto" else template,
            eos_ids=eos_ids(path, loaded.tokenizer),
        ),
        path=choose_score_path(loaded.model, pack(_trial(loaded.model)).to(device)).path,
        bias=float(getattr(config, "reward_bias", 0.0)),
        fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
    )


def to_reward_model(
    loaded: LoadedModel, renderer: Renderer, *, template: Literal["auto", "chat", "plain"], seed: int
) -> PreTrainedModel:
    """The sequence classifier on a language model's backbone, its head new: the language model is used up.

    The head is drawn from N(0, 1 / (d + 1)), a standard deviation of 1 / sqrt(d + 1) (Stiennon et al. 2020,
    arXiv 2009.01325; Huang et al. 2024, arXiv 2403.17031), d being the size of the hidden states.
    `loaded.tokenizer` gets a padding token that no text ends with, if it has none.

    Args:
        renderer: Says at which tokens texts end.
        template: Saved in the configuration, so that texts are written as in training wherever they are scored.

    Raises:
        ModelError: transformers has no sequence classifier of this architecture.
    """
    language, config = loaded.model, loaded.model.config
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise _no_classifier(loaded)
    config.num_labels = 1
    config.reward_bias, config.reward_template = 0.0, template
    # Without a generation configuration of its own, the folder's only word on where texts end.
    config.eos_token_id = sorted(renderer.stop_ids) or None
    config.pad_token_id = _padding(loaded.tokenizer, renderer.stop_ids)
    _make_room(language, config.pad_token_id)
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    head = getattr(model, "score", None)
    if type(model.base_model) is not type(language.base_model) or not isinstance(head, torch.nn.Linear):
        raise _no_classifier(loaded)
    size = head.in_features
    drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / (size + 1) ** 0.5
    model.score = torch.nn.Linear(size, 1, bias=False, device="meta")
    model.score.weight = torch.nn.Parameter(drawn.to(language.device, language.dtype))
    setattr(model, model.base_model_prefix, language.base_model)
    model.name_or_path = ""  # it stands in no folder: an adapter on it is saved merged
    model.eval()
    return model


def _no_classifier(loaded: LoadedModel) -> ModelError:
    return ModelError(
        "transformers has no sequence classifier of this architecture, so a reward model of it could not be loaded.",
        where=loaded.path,
        got=type(loaded.model).__name__,
        expected="a model type such as llama, qwen2, qwen3, mistral, gemma2, gpt2 or gpt_neox",
        todo="Train the reward model from another model: it need not be of the policy's kind.",
    )


def _padding(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> int:
    """The tokenizer's padding token, or a new one where a text could end with that."""
    tokenizer.padding_side = "right"  # positions are counted from the left end of a row
    ends = {*stop_ids, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_vocab()
        tokenizer.add_special_tokens({"pad_token": next(p for p in _PADS if vocabulary.get(p) not in stop_ids)})
    return int(tokenizer.pad_token_id)


def _make_room(model: PreTrainedModel, token: int) -> None:
    """A row of the embedding for `token`; nobody attends to it."""
    rows = _rows(model)
    if token >= rows:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().state_dict()["weight"][rows:] = 0


def _rows(model: PreTrainedModel) -> int:
    """Tokens the embedding has a row for."""
    return len(model.get_input_embeddings().state_dict()["weight"])


def sequence_scores(model: torch.nn.Module, batch: PackedBatch, path: Path) -> Float[Tensor, " sequences"]:
    """The logit of each completion, differentiable, without a bias: the head on the state of its last token.

    Computed in float32 (float64 for a float64 model), where transformers rounds a bfloat16 model's.
    """
    plain = plain_model(model)
    states = target_hidden(model, _at_ends(batch, plain.config.pad_token_id), path)
    wide = torch.promote_types(states.dtype, torch.float32)
    head = plain.get_submodule("score")
    assert isinstance(head, torch.nn.Linear)
    bias = None if head.bias is None else head.bias.to(wide)
    return F.linear(states.to(wide), head.weight.to(wide), bias)[:, 0]


def _at_ends(batch: PackedBatch, pad: int | None) -> PackedBatch:
    """`batch` with one target a completion, at its last slot; as in transformers, padding is not an end."""
    slots = []
    places = ((group, completion) for group in batch.groups for completion in group.completions)
    for (group, completion), (prompt, own) in zip(places, batch.spans, strict=True):
        slot = _last(completion.ids, pad)
        slots.append(own.start + slot if slot is not None else prompt.start + (_last(group.prompt_ids, pad) or 0))
    at = torch.tensor(slots, device=batch.input_ids.device)
    sequences = torch.arange(batch.sequences, device=at.device)
    return replace(batch, predictors=at, targets=batch.input_ids[at], sequence_of_target=sequences)


def _last(ids: Int[np.ndarray, " tokens"], pad: int | None) -> int | None:
    """The place of the last token that is no padding."""
    real = np.flatnonzero(ids != pad) if pad is not None else np.arange(len(ids))
    return int(real[-1]) if len(real) else None


@torch.no_grad()
def transformers_scores(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, " sequences"]:
    """The plain twin: transformers' own logits, one sequence at a time, no packing and no padding."""
    plain = plain_model(model)
    set_attention(plain, plain_attention(plain))
    logits = [plain(input_ids=ids[None], use_cache=False).logits[0, 0] for ids in sequence_ids(batch)]
    return torch.stack(logits).float()


@torch.no_grad()
def choose_score_path(model: torch.nn.Module, batch: PackedBatch) -> PathChoice:
    """As `choose_path`, for scores: the first path that agrees with transformers' own logits on `batch`.

    Raises:
        ModelError: none does.
    """
    was_training = model.training
    model.eval()
    try:
        plain = plain_model(model)
        states = target_hidden(model, _at_ends(batch, plain.config.pad_token_id), "padded")
        head = plain.get_submodule("score").weight
        assert isinstance(head, Tensor)
        limit = _TOLERANCE[plain.dtype] * states.float().norm(dim=1) * head.float().norm()
        truth = transformers_scores(model, batch)
        return first_agreeing(
            model, lambda path: sequence_scores(model, batch, path), truth, limit, ("scores", "a sequence")
        )
    finally:
        model.train(was_training)


def _trial(model: PreTrainedModel) -> list[CompletionGroup]:
    """A prompt and two completions of arbitrary tokens, longer than the model's windows if those are short."""
    random = np.random.default_rng(0)
    window = sliding_window(model.config) or 0
    room = min(row_positions(model.config) or _LONGEST_TRIAL, _LONGEST_TRIAL)
    prompt, longest = max(2, min(8 + window, room - 8)), 8
    rows, pad = _rows(model), model.config.pad_token_id

    def ids(tokens: int) -> Int[np.ndarray, " tokens"]:
        drawn = random.integers(0, rows, tokens, dtype=np.int32)
        return np.where(drawn == pad, (drawn + 1) % rows, drawn).astype(np.int32)

    made = tuple(Completion(ids(n), np.ones(n, dtype=bool)) for n in (longest, longest - 3))
    return [CompletionGroup(ids(prompt), made, Source("trial", 1))]


def _record(prompt: Content, completions: Sequence[Content], number: int) -> Ranking:
    """Prompt and completions of one kind; `number` is found again in `source.row`."""
    source = Source("completions to score", number)
    if isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
        return Ranking(prompt, tuple(completions), source)
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    # What a model wrote behind "Assistant:" begins with the space that the template puts there.
    said = (c if isinstance(c, tuple) else (Message("assistant", c.removeprefix(" ")),) for c in completions)
    return Ranking(turns, tuple(said), source)


def _unreadable(record: Ranking, why: str) -> RewardError:
    return RewardError(
        "The reward model cannot score this.",
        where=f"prompt {_shown(record.prompt)} with {' and '.join(map(_shown, record.completions[:2]))}",
        got=why,
        expected="text within the reward model's context that its template takes",
        todo="Leave the prompt out, ask for shorter completions, or take another reward model.",
    )


def _shown(content: Content) -> str:
    text = content if isinstance(content, str) else " / ".join(message.content for message in content)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
