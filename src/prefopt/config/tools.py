"""The settings of commands that train nothing."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.config.base import Config, RowsConfig, UsableRowsConfig

__all__ = [
    "ChatConfig",
    "CheckConfig",
    "FrontierCommand",
    "MergeConfig",
    "QuickstartConfig",
    "ResumeConfig",
    "ScoreConfig",
]


class QuickstartConfig(Config):
    """The whole story on a tiny model made on the spot."""

    out: Annotated[Path, Field(description="Folder to make.")] = Path("runs/quickstart")
    seed: Annotated[int, Field(description="Seeds everything.", ge=0)] = 0


class FrontierCommand(Config):
    """An experiment to run, or to go on with."""

    experiment: Annotated[Path, Field(description="YAML file: methods, their settings, where they begin, the truth.")]
    jobs: Annotated[int, Field(description="Processes that train and measure side by side.", ge=1)] = 1


class ResumeConfig(Config):
    """An interrupted run to finish."""

    run: Annotated[Path, Field(description="Run folder of an interrupted training run.")]


class MergeConfig(Config):
    """A LoRA adapter to write into plain weights."""

    adapter: Annotated[Path, Field(description="Adapter folder, or the run folder it was trained in.")]
    out: Annotated[Path, Field(description="Model folder to make.")]


class ChatConfig(Config):
    """A conversation at the terminal."""

    model: Annotated[str, Field(description="Model folder, run folder or hub name.")]
    system: Annotated[str | None, Field(description="What the model is told before the conversation.")] = None
    temperature: Annotated[float, Field(description="0: always the likeliest token.", ge=0)] = 0.7
    max_new_tokens: Annotated[int, Field(description="Length limit of an answer.", ge=1)] = 512
    seed: Annotated[int | None, Field(description="Makes the answers repeatable.", ge=0)] = None
    template: Annotated[
        Literal["auto", "chat", "plain"],
        Field(
            description="chat: the model's chat template; plain: Human:/Assistant: text; auto: chat if there is one."
        ),
    ] = "auto"


class CheckConfig(RowsConfig):
    """The data doctor: what becomes of every row, without training."""

    model: Annotated[
        str | None, Field(description="Count what this model's tokens decide, too: cut and too long rows.")
    ] = None
    prompts: Annotated[
        bool, Field(description="Look at prompts alone, as `prefopt ppo` takes them: completions may be missing.")
    ] = False
    against: Annotated[
        tuple[str, ...] | None,
        Field(description="Evaluation sets whose prompts must not be in the data: MT-Bench, AlpacaEval, any layout."),
    ] = None
    report: Annotated[Path | None, Field(description="Page of everything found to write, FILE.html.")] = None
    write: Annotated[
        Path | None,
        Field(
            description="FILE.jsonl to write with the usable rows but near duplicates and leaks; those left out are "
            "listed in FILE.jsonl.dropped.jsonl."
        ),
    ] = None

    @model_validator(mode="after")
    def _outputs_are_new_files(self) -> "CheckConfig":
        for name, path, suffix in (("report", self.report, ".html"), ("write", self.write, ".jsonl")):
            if path is not None and path.suffix != suffix:
                raise ValueError(f"{name} has to end in {suffix}, and {path} does not")
        if self.write is not None:
            target = self.write.resolve()
            for source in map(Path, (*self.data, *(self.against or ()))):
                if source.resolve() in (target, *target.parents):
                    raise ValueError(f"write would change {source}, which is read; name a file elsewhere")
        return self

    @model_validator(mode="after")
    def _tokens_need_a_model(self) -> "CheckConfig":
        for name in ("template", "max_length", "max_prompt_length"):
            if self.model is None and name in self.model_fields_set:
                raise ValueError(f"{name} does nothing without model")
        return self


class ScoreConfig(UsableRowsConfig):
    """Log-probabilities of completions and implicit rewards, or a reward model's scores."""

    model: Annotated[
        str | None, Field(description="Model folder or hub name; its log-probabilities, or --reward-model.")
    ] = None
    reward_model: Annotated[
        str | None, Field(description="Reward model folder, run of `prefopt reward`, or hub name, instead of --model.")
    ] = None
    out: Annotated[Path, Field(description="File of JSON lines to write.")]
    reference: Annotated[str | None, Field(description="Reference model folder; adds rewards.")] = None
    beta: Annotated[float | None, Field(description="Rewards are beta * log-ratio; default: 1.", gt=0)] = None
    tokens_per_batch: Annotated[
        int | None, Field(description="Token budget of a forward pass; default: auto, what memory takes.", ge=64)
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="Arithmetic; auto: bfloat16 on CUDA, else float32.")
    ] = "auto"

    @model_validator(mode="after")
    def _every_option_has_effect(self) -> "ScoreConfig":
        if (self.model is None) == (self.reward_model is None):
            raise ValueError("model or reward_model: one of them is needed, and no more than one")
        if self.reward_model is not None:
            for name in ("reference", "beta"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does nothing with reward_model")
        if self.beta is not None and self.reference is None:
            raise ValueError("beta does nothing without reference")
        return self
