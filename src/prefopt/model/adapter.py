"""LoRA adapters: put into a model, read from a folder and merged, written out with their base."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefopt.errors import ConfigError, ModelError
from prefopt.model.inspect import inspect_weights, listing, refuse_code

__all__ = ["ADAPTER", "add_lora", "apply_adapter", "check_targets", "explained", "peft_warnings", "save_merged"]

ADAPTER = "adapter_config.json"


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: int, dropout: float, targets: tuple[str, ...] | None, seed: int
) -> PeftModel:
    """Freeze `model` and put a LoRA adapter into it (float32, starting as the identity).

    Args:
        targets: Names of the linear layers that get one; None: every linear layer but the head. The head of a
            reward model, which is new, is trained whole.

    Raises:
        ConfigError: a target is no layer of this model; names those that are.
    """
    check_targets(model, targets)
    with torch.random.fork_rng(), peft_warnings():
        torch.manual_seed(seed)
        writes = model.get_output_embeddings() is not None
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(targets) if targets else "all-linear",
            exclude_modules=None if writes or targets else ["score"],
            task_type="CAUSAL_LM" if writes else None,
        )
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    if not writes:
        model.get_submodule("score").requires_grad_(True)
    return adapted


def check_targets(model: torch.nn.Module, targets: tuple[str, ...] | None) -> None:
    """Raise ConfigError unless every target is a linear layer of `model`; recipes ask before they make a run."""
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = {name.rsplit(".", 1)[-1] for name in layers}
    if targets and (unknown := set(targets) - linear):
        raise ConfigError(
            "The model has no such layer.",
            where="lora_targets",
            got=", ".join(sorted(unknown)),
            expected=f"some of {', '.join(sorted(linear))}",
        )


def apply_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the LoRA adapter merged into its weights."""
    kind = refuse_code(adapter / ADAPTER).get("peft_type")
    if kind != "LORA":
        raise ModelError(
            "This kind of adapter cannot be merged.",
            where=f"{adapter / ADAPTER}, key peft_type",
            got=repr(kind),
            expected="'LORA'",
        )
    inspect_weights(adapter, "adapter_model")
    if not (adapter / "adapter_model.safetensors").is_file():  # peft would read a pickle instead
        raise ModelError(
            "The adapter has no weights.",
            where=str(adapter),
            got=listing(adapter),
            expected="adapter_model.safetensors",
        )
    with (
        explained("The adapter does not fit its base model.", adapter, RuntimeError, ValueError, UserWarning),
        peft_warnings(),
    ):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter)
        if _adapts_tied_head(model):
            # Merging into the head must leave the embedding alone, which has the same weight.
            head = model.get_output_embeddings().get_base_layer()
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        return adapted.merge_and_unload()  # type: ignore[no-any-return]


def _adapts_tied_head(model: PreTrainedModel) -> bool:
    """Whether an adapter sits on an output head that shares its weight with the embedding."""
    head = model.get_output_embeddings()
    return isinstance(head, LoraLayer) and head.get_base_layer().weight is model.get_input_embeddings().weight


def save_merged(plain: PreTrainedModel, folder: Path) -> None:
    """Write the weights with the adapter added, under their own names; the model itself stays as it is."""
    state = {n.replace(".base_layer.", "."): t for n, t in plain.state_dict().items() if ".lora_" not in n}
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, LoraLayer):
                own = state[f"{name}.weight"]
                for adapter in layer.active_adapters:
                    own = own + layer.get_delta_weight(adapter).to(own.dtype)
                state[f"{name}.weight"] = own.cpu()
    if not _adapts_tied_head(plain):
        plain.save_pretrained(folder, state_dict=state)
        return
    plain.config.tie_word_embeddings = False  # in the folder the head has a weight of its own
    try:
        plain.save_pretrained(folder, state_dict=state)
    finally:
        plain.config.tie_word_embeddings = True


@contextmanager
def explained(what: str, folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """A library's complaint about a folder as our error; what the operating system refuses passes through."""
    try:
        yield
    except Exception as error:
        # transformers raises OSErrors of its own, without a number; tokenizers raises Exception itself.
        own = isinstance(error, OSError) and error.errno is None
        if not (own or isinstance(error, kinds) or type(error) is Exception):
            raise
        said = " ".join(str(error).split())
        raise ModelError(
            what,
            where=str(folder),
            got=said[:300] or type(error).__name__,
            todo="If it names a package, install that; else download or save the folder again.",
        ) from error


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Without what peft says of its own dealings with transformers and the hub."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # GPT-2: it then sets it right
        # An adapter on a tied head: we untie it before anything is merged.
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
        # It looks for the base's configuration on the hub to see whether embeddings were resized.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield
