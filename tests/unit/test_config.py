"""Configurations from YAML files and flags, and what is said when they are wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from prefopt.config import CheckConfig, DPOConfig, MergeConfig, PPOConfig, RewardConfig, ScoreConfig, SFTConfig
from prefopt.errors import ConfigError
from prefopt.parse import flag_of, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
GIVEN: dict[str, Any] = {"model": "m", "data": ("d.jsonl",), "out": "run"}
DPO: dict[str, Any] = {**GIVEN, "beta": "0.1"}


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(kind: type[BaseModel], file: Path | None = None, /, **flags: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(kind, file, flags)
    return caught.value


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sft.yaml", SFTConfig),
        ("dpo.yaml", DPOConfig),
        ("dpo-lora.yaml", DPOConfig),
        ("reward.yaml", RewardConfig),
        ("ppo.yaml", PPOConfig),
    ],
)
def test_shipped_configurations_are_right(name: str, kind: type[BaseModel]) -> None:
    config = parse_config(kind, CONFIGS / name, {})
    for key, value in yaml.safe_load((CONFIGS / name).read_text()).items():
        assert key in config.model_fields_set
        if isinstance(value, int):
            assert getattr(config, key) == value


def test_every_shipped_configuration_is_tested() -> None:
    shipped = {"sft.yaml", "dpo.yaml", "dpo-lora.yaml", "reward.yaml", "ppo.yaml"}
    assert {p.name for p in CONFIGS.glob("*.yaml")} == shipped


def test_flags_win_over_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: [a.jsonl, b.jsonl]\nout: run\nbeta: 0.5\nlr: 1e-5\nseed: 3\n")
    config = parse_config(DPOConfig, file, {"beta": "0.1", "data": ("c.jsonl",), "seed": None})
    assert (config.beta, config.data, config.lr, config.seed) == (0.1, ("c.jsonl",), 1e-5, 3)
    assert config.out == Path("run")
    assert config.batch_pairs == 64


def test_auto_leaves_the_token_budget_to_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: [d.jsonl]\nout: run\nbeta: 0.1\ntokens_per_batch: 4096\n")
    assert parse_config(DPOConfig, file, {}).tokens_per_batch == 4096
    assert parse_config(DPOConfig, file, {"tokens_per_batch": "auto"}).tokens_per_batch is None
    file.write_text("model: m\ndata: [d.jsonl]\nout: run\nbeta: 0.1\ntokens_per_batch: auto\n")
    assert parse_config(DPOConfig, file, {}).tokens_per_batch is None


def test_one_data_file_needs_no_list(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: a.jsonl\nout: r\nlora_rank: 4\nlora_targets: q_proj\n")
    config = parse_config(SFTConfig, file, {})
    assert config.data == ("a.jsonl",)
    assert config.lora_targets == ("q_proj",)


def test_a_saved_configuration_is_read_again(tmp_path: Path) -> None:
    config = parse_config(DPOConfig, None, {**DPO, "samples": "0", "eval_share": "0", "lora_rank": "4"})
    saved = {k: v for k, v in config.model_dump(mode="json").items() if v is not None}
    assert parse_config(DPOConfig, written(tmp_path, yaml.safe_dump(saved)), {}) == config


def test_beta_has_no_default_and_the_message_says_so() -> None:
    error = refused(DPOConfig, **GIVEN)
    assert error.what == "A setting is missing: beta."
    assert "no default: 0.1 is the paper's" in str(error.expected)
    assert error.todo == "Give --beta, or the same names as keys of a --config file."


def test_everything_missing_is_named_at_once() -> None:
    assert refused(DPOConfig).what == "Settings are missing: data, model, out, beta."
    assert refused(MergeConfig, adapter="a").todo == "Give --out."  # merge takes no file


def test_an_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    error = refused(DPOConfig, written(tmp_path, "model: m\ndata: d\n\nbata: 0.1\n"))
    assert error.where == f"{tmp_path / 'run.yaml'}:4 key bata"
    assert error.todo == "Did you mean beta?"
    assert "batch_pairs, beta, checkpoint_activations" in str(error.expected)


def test_a_hyphen_for_an_underscore_is_understood(tmp_path: Path) -> None:
    assert refused(DPOConfig, written(tmp_path, "batch-pairs: 3")).todo == "Did you mean batch_pairs?"


def test_a_key_of_another_recipe_is_sent_there(tmp_path: Path) -> None:
    error = refused(SFTConfig, written(tmp_path, "beta: 0.1"))
    assert error.todo == "It is a setting of dpo: delete it here."


def test_a_key_standing_twice_is_refused(tmp_path: Path) -> None:
    error = refused(SFTConfig, written(tmp_path, "lr: 1e-5\nseed: 1\nlr: 1e-6\n"))
    assert error.what == "The key 'lr' stands twice."
    assert error.got == "lr on lines 1 and 3"


@pytest.mark.parametrize(
    ("line", "got", "expected"),
    [
        ("lr: fast", "fast", "a number"),
        ("lr: 0", "0", "greater than 0"),
        ("lr: .inf", "inf", "a finite number"),
        ("lr: .nan", "nan", "a finite number"),
        ("lr:", "null", "a number"),
        ("epochs: 1.5", "1.5", "a whole number"),
        ("epochs: 2 times", "2 times", "a whole number"),
        ("epochs: yes", "true", "a value that is neither true nor false (in YAML yes, no, on and off mean these, too)"),
        ("eval_share: 1", "1", "less than 1"),
        ("compile_blocks: maybe", "maybe", "true or false"),
        ("checkpoint_activations: all of them", "all of them", "none, selective or all"),
        ("schedule: cosin", "cosin", "constant, linear or cosine"),
        ("template: [chat]", "['chat']", "auto, chat or plain"),
        ("model: 3", "3", "text"),
        ("data: []", "[]", "at least 1 item after validation, not 0"),
        ("data: {a: b}", "{'a': 'b'}", "a list"),
        ("columns: question", "question", "column names, each with the name it has in the data"),
        ("out: 5", "5", "a path"),
    ],
)
def test_wrong_values_say_where_what_and_why(tmp_path: Path, line: str, got: str, expected: str) -> None:
    file = written(tmp_path, f"# a comment\nseed: 1\n{line}\n")
    key = line.partition(":")[0]
    error = refused(SFTConfig, file, **{name: value for name, value in GIVEN.items() if name != key})
    assert (error.what, error.where) == (f"{key} is not right.", f"{file}:3 key {key}")
    assert (error.got, error.expected) == (got, expected)


def test_a_wrong_flag_is_named_as_a_flag(tmp_path: Path) -> None:
    error = refused(SFTConfig, written(tmp_path, "batch_rows: 8\n"), **GIVEN, batch_rows="0")
    assert (error.where, error.got, error.expected) == ("flag --batch-rows", "0", "greater than or equal to 1")


@pytest.mark.parametrize(
    ("kind", "flags", "what"),
    [
        (SFTConfig, "lora_alpha: 4", "lora_alpha does nothing without lora_rank."),
        (SFTConfig, "sample_tokens: 9, samples: 0", "sample_tokens does nothing with samples 0."),
        (SFTConfig, "eval_every: 9, eval_share: 0", "eval_every does nothing with eval_share 0."),
        (DPOConfig, "kl_rows: 9, beta: 1, eval_share: 0", "kl_rows does nothing with eval_share 0."),
        (ScoreConfig, "beta: 1", "beta does nothing without reference."),
        (
            SFTConfig,
            "weight_decay: 0.1, optimizer: rmsprop",
            "weight_decay does nothing with optimizer rmsprop; use adamw or leave it out.",
        ),
        (
            SFTConfig,
            "checkpoint_activations: selective, compile_blocks: true",
            "checkpoint_activations selective does nothing with compile_blocks, which selects itself.",
        ),
        (
            SFTConfig,
            "max_prompt_length: 64, max_length: 64",
            "max_prompt_length must be below max_length, or no completion token is left.",
        ),
    ],
)
def test_options_without_effect_are_errors(kind: type[BaseModel], flags: str, what: str) -> None:
    error = refused(kind, **GIVEN, **yaml.safe_load(f"{{{flags}}}"))
    assert (error.what, error.where) == (what, f"flag {flag_of(flags.partition(':')[0])}")


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length", "template"])
def test_check_takes_no_token_options_without_a_model(name: str) -> None:
    value = "plain" if name == "template" else "64"
    assert refused(CheckConfig, data=("d",), **{name: value}).what == f"{name} does nothing without model."
    parse_config(CheckConfig, None, {"data": ("d",), "model": "m", name: value})


def test_an_option_without_effect_in_a_file_is_found_there(tmp_path: Path) -> None:
    error = refused(SFTConfig, written(tmp_path, "seed: 1\nlora_dropout: 0.1\n"), **GIVEN)
    assert error.where == f"{tmp_path / 'run.yaml'}:2 key lora_dropout"
    assert error.got == "lora_dropout: 0.1"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "The configuration file holds no keys."),
        ("- lr\n", "The configuration file holds no keys."),
        ("lr: 1\n\tseed: 2\n", "The configuration file is no YAML."),
        ("a: 1\n---\nb: 1\n", "The configuration file is no YAML."),
        ("lr: !!python/object:os.system x\n", "The configuration file is no YAML."),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, what: str) -> None:
    file = written(tmp_path, text)
    error = refused(SFTConfig, file)
    assert error.what == what
    assert str(error.where).startswith(str(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(SFTConfig, tmp_path / "none.yaml").got == "No such file or directory"
    assert refused(SFTConfig, tmp_path).got == "Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "can't decode" in str(refused(SFTConfig, tmp_path / "latin.yaml").got)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": "4", "lora_dropout": "0.1"}, "lora_dropout cannot be had with ppo"),
        ({"kl_horizon": "500"}, "kl_horizon does nothing without target_kl"),
        ({"target_kl": "6", "kl_coef": "0"}, "kl_coef 0 stays 0"),
        # 64 * 4 = 256 samples: 1 - 0.2 * 256 / 51 is below 0.
        ({"target_kl": "6", "kl_horizon": "51"}, "kl_horizon must be above a fifth of a batch's 256 samples"),
        ({"batch_prompts": "2", "minibatches": "3"}, "minibatches must be at most batch_prompts"),
        ({"max_length": "64"}, "max_new_tokens must be below max_length"),
        ({"max_length": "100", "max_prompt_length": "50"}, "max_prompt_length must leave max_new_tokens of max_length"),
        ({"ppo_epochs": "1", "clip": "0.1"}, "clip does nothing with ppo_epochs 1 and minibatches 1"),
        ({"ppo_epochs": "1", "max_update_kl": "0.1"}, "max_update_kl does nothing with ppo_epochs 1"),
        ({"value_coef": "0", "value_lr": "1e-4"}, "value_lr does nothing with value_coef 0"),
    ],
)
def test_what_does_not_go_together_in_ppo(flags: dict[str, str], said: str) -> None:
    assert said in str(refused(PPOConfig, **GIVEN, reward="length:5", **flags))


def test_what_goes_together_in_ppo() -> None:
    flags = {"target_kl": "6", "kl_horizon": "52", "max_length": "100", "max_prompt_length": "36"}
    assert parse_config(PPOConfig, None, {**GIVEN, "reward": "length:5", **flags}).kl_horizon == 52
