"""Everything about a model folder that can be refused by looking, before transformers touches it."""

import json
import struct
from pathlib import Path
from typing import Any, Literal

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from prefopt.errors import ModelError

__all__ = ["Kind", "inspect_model", "inspect_weights", "listing", "refuse_code"]

Kind = Literal["language", "reward"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def inspect_model(folder: Path, kind: Kind = "language") -> None:
    """Raise ModelError unless `folder` holds a model of this kind that transformers knows, whole and in safetensors."""
    if not (folder / "config.json").exists():
        raise ModelError(
            "The folder is no model.",
            where=str(folder),
            got=listing(folder),
            expected="config.json and *.safetensors",
            todo="Give a folder in transformers' format.",
        )
    config = refuse_code(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            "transformers does not know this kind of model.",
            where=f"{folder / 'config.json'}, key model_type",
            got=repr(model_type),
            expected="a model type of the installed transformers",
            todo=f"Update transformers (now {transformers.__version__}) if the model is newer than it.",
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ModelError(
            "transformers does not take the model's configuration.",
            where=str(folder / "config.json"),
            got=" ".join(str(error).split())[:300],
            todo="Download or save the model again.",
        ) from error
    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            "This is not a causal language model.",
            where=str(folder / "config.json"),
            got=f"model_type {model_type!r}",
            expected="a decoder that predicts the next token",
        )
    _refuse_other_kind(folder, parsed, kind)
    inspect_weights(folder, "model")


def _refuse_other_kind(folder: Path, config: PretrainedConfig, kind: Kind) -> None:
    """A language model where a reward model is wanted, or the other way round.

    Where embedding and head share their weight, a reward model's weights would fill a language model.
    """
    where = str(folder / "config.json")
    made = [str(name) for name in config.architectures or []]
    classifies = any("ForSequenceClassification" in name for name in made)
    if kind == "language":
        if classifies:
            raise ModelError(
                "This is a reward model, not a language model.",
                where=where,
                got=", ".join(made),
                expected="a model that writes text",
                todo="A reward model is named with --reward or --reward-model.",
            )
        return
    if not classifies or config.num_labels != 1 or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        labels = f" with {config.num_labels} labels" if classifies else ""
        raise ModelError(
            "This is not a reward model.",
            where=where,
            got=(", ".join(made) or "no architecture named") + labels,
            expected="a sequence-classification model with one label, as `prefopt reward` makes",
            todo="Train one from a language model: `prefopt reward --model MODEL --data PAIRS --out RUN`.",
        )


def refuse_code(path: Path) -> dict[str, Any]:
    """The JSON at `path`; refuses what would run code from the folder, however deep it is nested."""
    if not path.exists():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ModelError("The model's configuration is no JSON object.", where=str(path), got=str(error)) from error

    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node) | {k for v in node.values() for k in keys(v)}
        return {k for v in node for k in keys(v)} if isinstance(node, list) else set()

    if found := keys(content) & {"auto_map", "trust_remote_code"}:
        raise ModelError(
            "The model wants to run code of its own.",
            where=f"{path}, key {', '.join(sorted(found))}",
            expected="a model that transformers implements itself",
            todo="prefopt never runs code from a model folder. If transformers knows the model, remove that key.",
        )
    return content


def inspect_weights(folder: Path, stem: str) -> None:
    """Weights are there, whole, and safetensors."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        named = refuse_code(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(s, str) and Path(s).name == s for s in named.values()):
            raise ModelError(
                "The index of the weight files is damaged.",
                where=f"{index}, key weight_map",
                expected="a file of this folder for every weight",
                todo="Download it again.",
            )
        shards = sorted(set(named.values()))
        if absent := [s for s in shards if not (folder / s).is_file()]:
            raise ModelError(
                "Weight files are missing.",
                where=str(index),
                got=f"no {', '.join(absent[:5])}",
                expected=f"all {len(shards)} files the index names",
                todo="Download the missing files.",
            )
    found = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if not found and pickles:
        raise ModelError(
            "The weights are pickle files, which can run code when they are read.",
            where=str(folder),
            got=", ".join(pickles[:4]),
            expected="*.safetensors",
            todo="Convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).",
        )
    if not found:
        raise ModelError("The folder has no weights.", where=str(folder), got=listing(folder), expected="*.safetensors")
    for path in found:
        _check_header(path)


def _check_header(path: Path) -> None:
    """A safetensors file says in its header where its last byte is; a cut file is shorter."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        end = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "A weight file is damaged.", where=str(path), got="no safetensors header", todo="Download it again."
        ) from error
    if end != size:
        raise ModelError(
            "A weight file is cut or damaged.",
            where=str(path),
            got=f"{size:,} bytes",
            expected=f"{end:,} bytes",
            todo="Download it again.",
        )


def listing(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "an empty folder"
