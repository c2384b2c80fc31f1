"""What happens after training, the same for every recipe: samples, the model folder, the report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.config import TrainConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.tokenize import Renderer
from prefopt.model.load import LoadedModel, save_model
from prefopt.model.sample import sample
from prefopt.progress import progress, say
from prefopt.report.page import write_report
from prefopt.run import RunFolder, write_atomically

__all__ = ["Sampler", "finish"]


@dataclass(frozen=True)
class Sampler:
    """Completes the same held-out prompts before and after training, with the same seed."""

    config: TrainConfig
    renderer: Renderer
    prompts: tuple[np.ndarray, ...]

    @classmethod
    def over(cls, config: TrainConfig, renderer: Renderer, groups: Sequence[CompletionGroup]) -> "Sampler":
        """The first `config.samples` distinct prompts of `groups`."""
        distinct = {g.prompt_ids.tobytes(): g.prompt_ids for g in groups}
        return cls(config, renderer, tuple(list(distinct.values())[: config.samples]))

    def complete(self, model: torch.nn.Module, label: str) -> list[str]:
        """One completion per prompt, at temperature 0.7."""
        with progress(label, total=len(self.prompts), unit="prompts") as bar:
            drawn = sample(
                model,
                self.prompts,
                completions=1,
                max_new_tokens=self.config.sample_tokens,
                temperature=0.7,
                stop_ids=self.renderer.stop_ids,
                seed=self.config.seed,
                on_progress=bar.advance,
            )
        return [self.renderer.decode(s.ids) for s in drawn]


def finish(
    run: RunFolder, loaded: LoadedModel, policy: torch.nn.Module, sampler: Sampler, before: list[str], step: int
) -> None:
    """Samples after training, `model/`, `report.html`, and the event that says the run is whole."""
    after = sampler.complete(policy, "samples after")
    prompts = [sampler.renderer.decode(ids) for ids in sampler.prompts]
    lines = [
        json.dumps({"prompt": p, "before": b, "after": a}, ensure_ascii=False)
        for p, b, a in zip(prompts, before, after, strict=True)
    ]
    write_atomically(run.path / "samples.jsonl", "".join(line + "\n" for line in lines).encode())
    save_model(policy, loaded.tokenizer, run.model)
    run.event("finished", step=step)
    report = write_report(run.path)
    say(f"model:  {run.model}")
    say(f"report: {report}")
