from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from biofx.cli import main
from biofx.config import BioConfig, config_options
from biofx.errors import OptionError
from biofx.rewriting.config_text import commented_toml, describe_config, options_of, rules_with_options
from biofx.rewriting.registry import available_passes


def _shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return " ".join(file.getvalue().split())


def _printed(pass_name: str | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(describe_config(pass_name))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("pass_name", [None, *sorted(available_passes())])
def test_the_file_loads_as_the_defaults_and_says_what_each_option_means(
    pass_name: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(commented_toml(pass_name), encoding="utf-8")
    assert BioConfig.from_toml(path) == BioConfig()
    lines = path.read_text(encoding="utf-8").splitlines()
    set_fields = [line.partition(" = ")[0] for line in lines if line and not line.startswith("#")]
    assert set_fields == list(options_of(pass_name))
    assert max((len(line) for line in lines if line.startswith("#")), default=0) <= 100
    assert not any(line.startswith("#") and line.endswith("-") for line in lines)


def test_a_changed_line_of_the_file_changes_that_field_alone(tmp_path: Path) -> None:
    text = commented_toml()
    for old, new in (("Gamma = 0", "Gamma = 3"), ("base_lr = 0.1", 'base_lr = "none"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    text = text.replace("# [[overrides]]\n# selector", "[[overrides]]\nselector").replace(
        "# fuzzy_learning_rate_factor_nu = 0.1", "fuzzy_learning_rate_factor_nu = 0.1"
    )
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    expected = BioConfig(weight_splitting_Gamma=3, base_lr=None)
    assert BioConfig.from_toml(path) == expected.override("layer4.*", fuzzy_learning_rate_factor_nu=0.1)


def test_the_table_has_default_range_and_meaning_of_every_field() -> None:
    whole = " ".join(_printed(width=400).split())
    for name, option in config_options().items():
        assert f"{name} = " in whole
        assert str(option.permitted) in whole
    assert "weight_splitting_Gamma = 0 a whole number in [0, inf) Synapses per connection" in whole
    assert max(map(len, _printed().splitlines())) <= 80


def test_options_of_a_pass_are_those_that_it_reads_or_is_switched_by() -> None:
    assert list(options_of("watch-units")) == ["unit_turnover"]
    assert "weight_splitting_Gamma" in options_of("fold-splits")
    assert "weight_splitting_Gamma" not in _printed("scale-gradients")
    assert "fuzzy_lr_min" in _printed("scale-gradients")
    with pytest.raises(OptionError, match="found 'fold-split'; did you mean 'fold-splits'"):
        options_of("fold-split")


def test_options_of_a_rule_are_those_that_it_reads() -> None:
    assert list(options_of(rule="synaptic_scaling")) == ["synaptic_scaling_rate"]
    assert list(options_of("watch-units", "rejuvenate_units")) == ["unit_turnover"]
    text = _shown(describe_config(rule="crystallize"))
    assert "crystal_thresh = 4.5e-05 a number in (0, inf)" in text
    assert 'Rule("crystallize", threshold=…)' in text
    assert "crystallize reads it from the config" in text  # its floor
    assert "synaptic_scaling_rate" not in text
    with pytest.raises(
        OptionError, match=r"found 'crystalize'; did you mean 'crystallize'.*there are crystal"
    ):
        options_of(rule="crystalize")


@pytest.mark.parametrize("rule", rules_with_options())
def test_the_file_of_a_rule_loads_as_the_defaults(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(commented_toml(rule=rule), encoding="utf-8")
    assert BioConfig.from_toml(path) == BioConfig()
    assert "overrides" not in path.read_text(encoding="utf-8")


def test_the_command_writes_a_file_outside_a_terminal_and_refuses_unknown_passes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == commented_toml()
    assert main(["config", "--pass", "mask-weights", "--toml"]) == 0
    assert capsys.readouterr().out == commented_toml("mask-weights")
    assert main(["config", "--rule", "shrink_and_perturb", "--toml"]) == 0
    assert capsys.readouterr().out == commented_toml(rule="shrink_and_perturb")
    assert main(["config", "--rule", "shrink"]) == 1
    assert "found 'shrink'; did you mean 'shrink_and_perturb'" in capsys.readouterr().err
    assert main(["config", "--pass", "mask"]) == 1
    assert "expected the name of a pass, found 'mask'" in capsys.readouterr().err
