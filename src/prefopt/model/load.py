"""Model folders in and out: safetensors only, no code from the folder, kind refusals before anything loads."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from prefopt.errors import ModelError
from prefopt.model.adapter import ADAPTER, add_lora, apply_adapter, explained, peft_warnings, save_merged
from prefopt.model.inspect import Kind, inspect_model, listing, refuse_code

__all__ = [
    "LoadedModel",
    "add_lora",
    "eos_ids",
    "load_config",
    "load_model",
    "load_reference",
    "load_tokenizer",
    "max_positions",
    "merge",
    "row_positions",
    "save_model",
    "sliding_window",
    "weights_fingerprint",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score, its tokenizer, and content hashes of what they were made from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    path: str


def load_model(path: str, *, dtype: torch.dtype, device: torch.device, kind: Kind = "language") -> LoadedModel:
    """Load a transformers folder, a run folder, a LoRA adapter folder (merged into its base) or a hub name.

    Args:
        kind: language: a causal LM; reward: a sequence classifier with one label on the same kind of decoder,
            which stands in no adapter folder.

    Raises:
        ModelError: not a model, unsafe (pickle, code of its own), damaged, incomplete, or of another kind.
    """
    folder = resolve(path)
    adapter = folder if (folder / ADAPTER).exists() and kind == "language" else None
    base = _adapter_base(folder) if adapter else folder
    model = _load_base(base, dtype, kind)
    fingerprint = weights_fingerprint(base)
    if adapter is not None:
        model = apply_adapter(model, adapter)
        fingerprint = _hash(fingerprint, weights_fingerprint(adapter))
    # What an adapter trained on this model names as its base; merged weights stand in no folder (see save_model).
    model.name_or_path = "" if adapter else str(base.resolve()) if Path(path).exists() else path
    tokenizer = load_tokenizer(str(folder if (folder / "tokenizer_config.json").exists() else base))
    _check_vocabulary(folder, model, tokenizer)
    template = json.dumps(tokenizer.chat_template)
    return LoadedModel(
        model=model.to(device).eval(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        tokenizer_fingerprint=_hash(_tokenizer_content(tokenizer)),
        template_fingerprint=_hash(template),
        path=path,
    )


def _load_base(folder: Path, dtype: torch.dtype, kind: Kind) -> PreTrainedModel:
    inspect_model(folder, kind)
    _quiet()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    two_way = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if two_way or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "This is not a causal language model.",
            where=str(folder / "config.json"),
            got=f"model_type {config.model_type!r}, an encoder",
            expected="a decoder that predicts the next token",
        )
    # Not the folder's to choose: a name with a slash in it would have native code fetched from the hub.
    config._attn_implementation = config._experts_implementation = None
    with explained("transformers cannot load this model.", folder, ImportError, SafetensorError, ValueError):
        auto = AutoModelForCausalLM if kind == "language" else AutoModelForSequenceClassification
        loading: Any = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with names
            output_loading_info=True,
        )
    model, report = loading
    _refuse_gaps(folder, "nothing for ", report["missing_keys"])
    shapes = {f"{name} {tuple(found)} instead of {tuple(due)}" for name, found, due in report["mismatched_keys"]}
    _refuse_gaps(folder, "", shapes)
    result: PreTrainedModel = model
    return result


def _refuse_gaps(folder: Path, prefix: str, gaps: set[str]) -> None:
    if gaps:
        names = sorted(gaps)
        raise ModelError(
            "The weights do not fill the model.",
            where=str(folder),
            got=f"{prefix}{', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
            expected="a weight of the right shape for every layer of the configuration",
            todo="Download or save the model again.",
        )


def load_reference(path: str, policy: LoadedModel, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Load a reference for `policy`.

    Raises:
        ModelError: it reads other token ids, so that log-ratios would compare different texts.
    """
    reference = load_model(path, dtype=dtype, device=device)
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            "Model and reference have different vocabularies.",
            where=f"{policy.path} and {path}",
            expected="the same tokenizer, since log-probabilities of the same tokens are compared",
            todo="Take the model that training starts from as the reference, or one of its family.",
        )
    return reference


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, run folder or hub name.

    Raises:
        ModelError: there is none, or it wants to run code of its own.
    """
    folder = resolve(path)
    if not (folder / "tokenizer_config.json").exists() and (folder / ADAPTER).exists():
        folder = _adapter_base(folder)
    if not any(
        (folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise ModelError(
            "The model folder has no tokenizer.",
            where=str(folder),
            got=listing(folder),
            expected="tokenizer.json and tokenizer_config.json",
            todo="Copy the tokenizer's files into the folder, or save it there with tokenizer.save_pretrained.",
        )
    refuse_code(folder / "tokenizer_config.json")
    _quiet()
    kinds = (ValueError, KeyError, AttributeError, TypeError, ImportError)
    with explained("The tokenizer cannot be loaded.", folder, *kinds):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def resolve(path: str) -> Path:
    """The folder a model argument means; a hub name is fetched into the hub's own cache."""
    folder = Path(path)
    if folder.is_file():
        raise ModelError(
            "The model is a file.", where=path, expected="a model folder", todo="Give the folder that holds it."
        )
    if (folder / "manifest.json").exists() and (folder / "config.yaml").exists():
        if not (folder / "model").is_dir():
            raise ModelError(
                "This run has no model yet.", where=path, todo=f"Finish it first: `prefopt resume {path}`."
            )
        return folder / "model"
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError("There is no such model folder.", where=path, todo="Check the path.")
    return _from_hub(path)


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            "The model is neither a folder here nor reachable on the hub.",
            where=name,
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="a model folder, a run folder, or a hub name such as owner/name",
            todo="Check the spelling; without a network give a folder.",
        ) from error


def _adapter_base(folder: Path) -> Path:
    """The base model an adapter folder names; relative names are tried beside the adapter too."""
    name = str(refuse_code(folder / ADAPTER).get("base_model_name_or_path") or "")
    for candidate in (Path(name), folder / name):
        if name and candidate.is_dir():
            return resolve(str(candidate))
    try:
        if not name:
            raise ModelError("The adapter names no base model.")
        return resolve(name)
    except ModelError as error:
        raise ModelError(
            "The adapter's base model is not here.",
            where=f"{folder / ADAPTER}, key base_model_name_or_path",
            got=repr(name),
            expected="a model folder or a reachable hub name",
            todo="Put the base model there, or write its new place into that key.",
        ) from error


def _check_vocabulary(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = len(model.get_input_embeddings().state_dict()["weight"])
    top = max(tokenizer.get_vocab().values(), default=-1)
    if top >= rows:
        raise ModelError(
            "Tokenizer and model do not belong together.",
            where=str(folder),
            got=f"token id {top}",
            expected=f"ids below {rows}, the rows of the embedding",
            todo="Use the tokenizer the model was trained with.",
        )


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the configuration and every safetensors file, as "sha256:<hex>".

    `transformers_version` is left out: saving the same weights with another release changes nothing.
    """
    digest = hashlib.sha256()
    for name in ("config.json", ADAPTER):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config.pop("transformers_version", None)
            digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _hash(*texts: str) -> str:
    return f"sha256:{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()}"


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return body + json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain transformers folder, or for LoRA a peft adapter folder; whole or absent.

    Both load with `AutoModelForCausalLM.from_pretrained(folder)`. An adapter whose base stands in no
    folder (one that another adapter was merged into) could not be found again: it is saved merged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    _quiet()
    try:
        draft.chmod(0o755)
        assert isinstance(model, PreTrainedModel | PeftModel)
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(plain, PreTrainedModel)
        if isinstance(model, PeftModel) and plain.name_or_path:
            with peft_warnings():
                model.save_pretrained(draft, save_embedding_layers=False)
        else:
            plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
            if isinstance(model, PeftModel):
                save_merged(plain, draft)
            else:
                plain.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty model card
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def merge(adapter: Path, out: Path) -> None:
    """Write a LoRA adapter (or the run that trained it) into plain weights, in its base's dtype.

    Raises:
        ModelError: there is no adapter, or `out` is taken.
    """
    folder = resolve(str(adapter))
    if not (folder / ADAPTER).exists():
        raise ModelError(
            "There is no adapter to merge.",
            where=str(folder),
            got=listing(folder),
            expected=ADAPTER,
            todo="These are plain weights already; use the folder as it is.",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError("The output folder is not empty.", where=str(out), todo="Choose another --out.")
    config = load_config(str(folder))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    loaded = load_model(str(folder), dtype=dtype, device=torch.device("cpu"))
    save_model(loaded.model, loaded.tokenizer, out)


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model folder, run folder or hub name, nothing else loaded."""
    folder = resolve(path)
    base = _adapter_base(folder) if (folder / ADAPTER).exists() else folder
    inspect_model(base)
    config: PretrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=False)
    return config


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a text: the generation configuration's and the tokenizer's."""
    folder = resolve(path)
    base = _adapter_base(folder) if (folder / ADAPTER).exists() else folder
    # Without a generation configuration transformers derives one from the model's.
    name = "generation_config.json" if (base / "generation_config.json").exists() else "config.json"
    named = refuse_code(base / name).get("eos_token_id")
    several = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*several, tokenizer.eos_token_id) if isinstance(i, int))


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest sequence a model holds, or None where nothing bounds it."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config.get_text_config(), name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def row_positions(config: PretrainedConfig) -> int | None:
    """Longest row whose log-probability is its own affair; None where nothing bounds it.

    LongRoPE (Phi) takes other frequencies for a whole forward pass once its longest row is beyond
    `original_max_position_embeddings`: such a row would change those it shares a batch with.
    """
    inner = config.get_text_config()
    rope = getattr(inner, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(inner, "original_max_position_embeddings", None)
    limits = [max_positions(config), original if rope.get("rope_type") == "longrope" else None]
    return min((limit for limit in limits if limit), default=None)


def sliding_window(config: PretrainedConfig) -> int | None:
    """How many positions back the model's windowed layers see, or None if it has none."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _quiet() -> None:
    """Our own progress speaks; transformers' bars and its report of loaded keys (checked above) do not."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
