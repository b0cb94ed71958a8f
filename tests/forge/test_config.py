"""Configuration: unknown keys are named, wrong values are one line, the resolved file reads back equal."""

from dataclasses import replace

import pytest

from longforge.errors import ConfigError
from longforge.forge.config import ForgeConfig, dump_config, load_config, parse_config


def test_the_resolved_config_reads_back_equal():
    config = ForgeConfig(name='with "quotes" and ü', seed=7, max_seconds=12.5)
    config = replace(config, agent=replace(config.agent, command=("python", "-m", "mine", "a b")))
    config = replace(config, environment=replace(config.environment, mix={"base": 0.5, "method": 1.0}))
    assert parse_config(dump_config(config)) == config
    assert parse_config("") == ForgeConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", "unknown key sed; the nearest known one is seed"),
        (
            "[rollout]\ngroups_size = 3",
            "unknown key rollout.groups_size; the nearest known one is rollout.group_size",
        ),
        ("[trainer]\nsteps = 0", "trainer.steps: expected greater than or equal to 1, got 0"),
        ('[trainer]\nsteps = "many"', 'trainer.steps: expected a valid integer, got "many"'),
        ("max_seconds = inf", "max_seconds: expected a finite number, got Infinity"),
        ("[rollout]\nbuffer = 4", "rollout.buffer: expected at least rollout.groups_per_step = 8, got 4"),
        ('[rollout]\nthinking = "maybe"', "rollout.thinking: expected 'adaptive', 'enabled' or 'disabled'"),
        ("seed = 1979-05-27", "got a date or time"),
        ("seed = ", "not valid TOML"),
        ("trainer = 3", "trainer: expected"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(text, words):
    with pytest.raises(ConfigError) as error:
        parse_config(text, "mine.toml")
    assert words in str(error.value)
    assert str(error.value).startswith("mine.toml: ") and "\n" not in str(error.value)


def test_folders_are_relative_to_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "weights"\n[environment]\ntree = "../src"\n')
    config = load_config(path)
    assert config.model == str(tmp_path / "weights")
    assert config.environment.tree == str(tmp_path.parent / "src")
    path.write_text("")
    assert load_config(path) == ForgeConfig()
    with pytest.raises(ConfigError, match="expected a TOML file, found none"):
        load_config(tmp_path / "none.toml")


def test_window_of_the_demo():
    assert ForgeConfig().rollout.window == 4
