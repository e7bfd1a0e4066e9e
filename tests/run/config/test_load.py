"""A configuration from options, files and assignments: what overrides what, and what is refused."""

from pathlib import Path

import pytest

from allocator.core.errors import UserError
from allocator.run.config.load import build_config
from allocator.run.config.options import RunOptions, list_flags
from allocator.run.config.run import RunConfig


def test_options_and_a_configuration_say_the_same() -> None:
    by_options = build_config("some/model", None, {"target": 0.3, "seed": 4, "method": "evolution"})
    by_object = build_config(config=RunConfig(model="some/model", target=0.3, seed=4, search={"method": "evolution"}))
    assert by_options == by_object
    assert build_config(config=by_object) is by_object


def test_a_configuration_of_ones_own_has_the_defaults_of_a_file() -> None:
    """A preset's numbers and what ``auto`` stands for come with the object, however it is made."""
    assert RunConfig(target=0.4) == build_config(None, None, {"target": 0.4})
    assert RunConfig(target=0.4).search.rounds == 2
    preset = RunConfig(pattern="unstructured", search={"method": "evopress"})
    assert preset.search.evolution.offspring == 64
    assert RunConfig(objectives=("params",)).search.method == "sweep"


def test_options_override_a_configuration_and_settings_override_options() -> None:
    base = RunConfig(target=0.3, seed=1, tokens={"test": 1024})
    config = build_config("other", base, {"seed": 2, "settings": ["seed=3", "tokens.selection=512"]})
    assert (config.model, config.target, config.seed) == ("other", 0.3, 3)
    assert (config.tokens.test, config.tokens.selection) == (1024, 512)


def test_options_override_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("target: 0.2\nsearch: {budget: 10 evaluations}\n")
    config = build_config(None, file, {"budget": "20 evaluations"})
    assert (config.target, config.search.budget) == (0.2, "20 evaluations")


def test_an_unknown_option_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="unknown option 'targt'; did you mean 'target'"):
        build_config(None, None, {"targt": 0.5})


def test_every_option_is_a_key_or_said_to_be_elsewhere() -> None:
    assert set(list_flags()) == set(RunOptions.__annotations__)
    assert set(RunOptions.__annotations__) - set(RunConfig.model_fields) == {"method", "budget", "settings"}
