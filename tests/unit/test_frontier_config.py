"""An experiment's file: what is shipped, what is refused, and where the message points."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.config import DPOConfig, FrontierConfig
from prefopt.errors import ConfigError
from prefopt.parse import parse_config

CONFIGS = Path(__file__).parents[2] / "configs" / "sentiment"
TEXT = """\
out: runs/x
model: m
reward: length:5
seeds: [0, 1]
prompts: {data: texts.jsonl, words: 3, train: 20, test: 10}
pairs: {samples: 4}
methods:
  - name: DPO
    recipe: dpo
    settings: {lr: 1e-3}
    sweep:
      beta: [0.1, 1]
  - {name: Best-of-N, recipe: best_of_n, reward: truth, n: [4, 16]}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(text)
    return file


def refused(folder: Path, old: str, new: str) -> ConfigError:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        parse_config(FrontierConfig, written(folder, TEXT.replace(old, new)), {})
    return caught.value


@pytest.mark.parametrize("name", ["grammar.yaml", "stories.yaml", "imdb.yaml", "imdb-small.yaml"])
def test_shipped_experiments_are_right(name: str) -> None:
    config = parse_config(FrontierConfig, CONFIGS / name, {})
    methods = {method.name: method for method in config.methods}
    assert list(methods) == ["DPO", "PPO", "PPO-GT", "Unlikelihood", "Preferred-FT", "Best-of-N"]
    assert [arm.settings["beta"] for arm in methods["DPO"].arms] == [0.05, 0.1, 1, 5]
    assert [arm.settings["target_kl"] for arm in methods["PPO-GT"].arms] == [3, 6, 9, 12]
    alphas = [arm.settings["loss_options"]["alpha"] for arm in methods["Unlikelihood"].arms]
    assert alphas == [0.05, 0.1, 0.5, 1]
    assert methods["Best-of-N"].n == (4, 16, 64)


def test_every_shipped_experiment_is_tested() -> None:
    assert {p.name for p in CONFIGS.glob("*.yaml")} == {"grammar.yaml", "stories.yaml", "imdb.yaml", "imdb-small.yaml"}


def test_a_sweep_is_every_combination(tmp_path: Path) -> None:
    text = TEXT.replace("settings: {lr: 1e-3}", "settings: {lr: 1e-3, loss: simpo}")
    text = text.replace("      beta: [0.1, 1]\n", "      beta: [2]\n      loss_options.gamma: [0.5, 1]\n")
    config = parse_config(FrontierConfig, written(tmp_path, text), {})
    arms = config.methods[0].arms
    assert [arm.label for arm in arms] == ["beta 2, gamma 0.5", "beta 2, gamma 1"]
    assert [arm.folder for arm in arms] == ["dpo-beta-2-gamma-0.5", "dpo-beta-2-gamma-1"]
    assert arms[1].settings == {"lr": "1e-3", "loss": "simpo", "beta": 2, "loss_options": {"gamma": 1}}


def test_a_run_gets_what_the_experiment_sets(tmp_path: Path) -> None:
    config = parse_config(FrontierConfig, written(tmp_path, TEXT), {})
    arm = config.methods[0].arms[0]
    made = arm.training_config(
        config, 3, model="start", pairs=("p.jsonl",), prompts="q", learned="", out=tmp_path / "run"
    )
    assert isinstance(made, DPOConfig)
    assert (made.model, made.data, made.seed, made.beta, made.lr) == ("start", ("p.jsonl",), 3, 0.1, 1e-3)
    assert (made.save_every, made.samples) == (100, 0)
    assert made.keep_checkpoints > 100_000  # every one is measured


@pytest.mark.parametrize(
    ("old", "new", "what", "where"),
    [
        ("words: 3", "wordz: 3", "There is no setting 'prompts.wordz' here.", ":5 key prompts.wordz"),
        (", test: 10", "", "prompts.test is missing.", ":5 key prompts"),
        ("test: 10", "test: 1", "prompts.test is not right.", ":5 key prompts.test"),
        (
            "words: 3",
            "words: 3, tokens: [2, 8]",
            "words and tokens both say how long a prompt is",
            ":5 key prompts.words",
        ),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds is not right.", ":4 key seeds"),
        ("pairs: {samples: 4}\n", "", "pairs is missing: methods are trained on them.", ":6 key methods"),
        ("lr: 1e-3", "lr: -1", "methods[0].settings.lr is not right.", ":10 key methods[0].settings.lr"),
        ("lr: 1e-3", "lrr: 1", "methods[0].settings.lrr is not right.", ":10 key methods[0].settings.lrr"),
        ("lr: 1e-3", "out: x", "methods[0].settings.out is not right.", ":10 key methods[0].settings.out"),
        ("beta: [0.1, 1]", "beta: [0.1, 0]", "methods[0].sweep.beta is not right.", ":12 key methods[0].sweep.beta"),
        ("beta: [0.1, 1]", "lr: [1e-3]", "methods[0].settings is not right.", ":10 key methods[0].settings"),
        ("beta: [0.1, 1]", "beta: 1", "methods[0].sweep.beta is not right.", ":12 key methods[0].sweep.beta"),
        ("recipe: dpo", "recipe: dpoo", "methods[0].recipe is not right.", ":9 key methods[0].recipe"),
        ("name: Best-of-N", "name: DPO", "methods need different names.", ":7 key methods"),
        ("n: [4, 16]", "samples: 8", "n, a list of numbers from 1 on", ":13 key methods[1]"),
        ("n: [4, 16]", "n: [4, 16], samples: 8", "samples belongs to best_of_n", ":13 key methods[1].samples"),
        ("n: [4, 16]", "n: [4, 16], n: [2]", "The key 'methods[1].n' stands twice.", ":13"),
        ("model: m", "model: m\nstart: {lr: 1e-3}", "start is not right.", ":3 key start"),
        ("model: m", "model: m\nreward_model: {lr: 1e-3}", "reward_model does nothing", ":3 key reward_model"),
    ],
)
def test_what_is_wrong_is_named_with_its_path_and_line(
    tmp_path: Path, old: str, new: str, what: str, where: str
) -> None:
    error = refused(tmp_path, old, new)
    assert error.what.startswith(what)
    assert error.where == f"{tmp_path / 'experiment.yaml'}{where}"


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"recipe": "ppo"}, "reward, truth or learned, belongs to ppo and best_of_n."),
        ({"recipe": "dpo", "reward": "truth"}, "reward, truth or learned, belongs to ppo and best_of_n."),
        ({}, "recipe or runs is needed, and not both."),
        ({"runs": ["a"], "settings": {"lr": 1}}, "settings and sweep belong to sft, dpo and ppo."),
        ({"runs": ["a/x", "b/x"]}, "runs has two folders of the same name"),
    ],
)
def test_what_belongs_together(tmp_path: Path, method: dict[str, Any], what: str) -> None:
    text = yaml.safe_dump({**yaml.safe_load(TEXT), "methods": [{"name": "Mine", **method}]})
    with pytest.raises(ConfigError) as caught:
        parse_config(FrontierConfig, written(tmp_path, text), {})
    assert caught.value.what.startswith(what)


def test_an_alias_that_holds_itself_is_no_trap(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        parse_config(FrontierConfig, written(tmp_path, "methods: &a [*a]\n"), {})
