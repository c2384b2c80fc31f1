"""What happens after training, the same for every recipe: samples, the model folder, the report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from prefopt.config import PolicyConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.tokenize import Renderer
from prefopt.model.load import LoadedModel, save_model
from prefopt.model.sample import Sampled, sample
from prefopt.report.page import write_report
from prefopt.run import RunFolder, write_atomically

__all__ = ["Sampler", "finish", "save_and_report"]


@dataclass(frozen=True)
class Sampler:
    """Completes the same held-out prompts before and after training, with the same seed."""

    config: PolicyConfig
    renderer: Renderer
    prompts: tuple[np.ndarray, ...]

    @classmethod
    def over(cls, config: PolicyConfig, renderer: Renderer, groups: Sequence[CompletionGroup]) -> "Sampler":
        """The first `config.samples` distinct prompts of `groups`."""
        distinct: dict[bytes, np.ndarray] = {}
        for group in groups if config.samples else ():
            distinct.setdefault(group.prompt_ids.tobytes(), group.prompt_ids)
            if len(distinct) == config.samples:
                break
        return cls(config, renderer, tuple(distinct.values()))

    def complete(self, model: torch.nn.Module) -> list[Sampled]:
        """One completion per prompt, at temperature 0.7."""
        return sample(
            model,
            self.prompts,
            max_new_tokens=self.config.sample_tokens,
            temperature=0.7,
            stop_ids=self.renderer.stop_ids,
            seed=self.config.seed,
        )

    def length(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean tokens of such completions now, as a metric; nothing where none are asked for."""
        lengths = [len(s.ids) for s in self.complete(model)]
        return {"lengths/sampled": sum(lengths) / len(lengths)} if lengths else {}


def finish(
    run: RunFolder, loaded: LoadedModel, policy: torch.nn.Module, sampler: Sampler, before: list[Sampled], step: int
) -> None:
    """Samples after training, `model/`, `report.html`, and the event that says the run is whole."""
    text = sampler.renderer.decode
    lines = [
        json.dumps({"prompt": text(p), "before": text(b.ids), "after": text(a.ids)}, ensure_ascii=False)
        for p, b, a in zip(sampler.prompts, before, sampler.complete(policy), strict=True)
    ]
    write_atomically(run.path / "samples.jsonl", "".join(line + "\n" for line in lines).encode())
    save_and_report(run, policy, loaded.tokenizer, step)


def save_and_report(run: RunFolder, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
    """`model/`, `report.html`, and the event that says the run is whole."""
    save_model(model, tokenizer, run.model)
    run.event("finished", step=step)
    write_report(run.path)
