"""Go on with an unfinished run as if nothing had happened."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from prefopt.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig
from prefopt.errors import RunError
from prefopt.progress import say
from prefopt.recipes import dpo, ppo, reward, sft
from prefopt.run import RunFolder

__all__ = ["RECIPES", "resume"]

RECIPES: dict[str, tuple[type[TrainConfig], Callable[..., RunFolder]]] = {
    "sft": (SFTConfig, sft.train),
    "dpo": (DPOConfig, dpo.train),
    "ppo": (PPOConfig, ppo.train),
    "reward": (RewardConfig, reward.train),
}


def resume(path: Path) -> RunFolder:
    """Train the rest of the run at `path`, from its last whole checkpoint, to the same numbers.

    Relative names in its configuration are taken from the folder it was started in.

    Raises:
        RunError: no run there, a finished one, one that another process works on, or model,
            tokenizer, template or data have changed.
    """
    run = RunFolder.open(path.absolute())
    run.lock()
    if run.finished:
        raise RunError(
            "This run is finished.",
            where=str(path),
            expected="an interrupted run",
            todo=f"Its model is {run.model}; train further from it with --model {path} and another --out.",
        )
    kind, train = RECIPES[run.recipe]
    say(f"resuming {run.recipe} run {path}")
    started_in = Path(run.manifest.get("folder", ""))
    with chdir(started_in if started_in.is_dir() else Path.cwd()):
        train(kind.model_validate(run.config_dict), run)
    return RunFolder(path)
