from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import biofx
from biofx.cli import main
from biofx.cli.values import read_value
from biofx.config import config_options

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 6)
        step = 0
        while step < x.shape[0]:
            h = torch.relu(self.w_in(x[step]) + self.w_rec(h))
            step += 1
        return self.w_out(h)

instance = Net(8)
number = 3

def needs_width(width):
    return Net(width)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A model file in the current folder, which terminals of 80 columns look at."""
    (tmp_path / "mymodels.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield "mymodels.py:Net"
    sys.modules.pop("mymodels", None)


def test_transform_prints_diff_and_report_and_writes_json(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transform", target, "--set", "weight_splitting_Gamma=2", "--only", "fc1", "--diff"]
    assert main([*arguments, "--json", "report.json"]) == 0
    printed = capsys.readouterr().out
    assert "+ fc1_folded = fold_weight(fc1_scaled, rows=2)" in printed
    assert "3 groups of 2 of its 6 output channels summed" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["schema"] == "biofx.report/1"
    assert [entry["applied"] for entry in report["passes"]] == [1, 1, 2]


def test_transform_prints_a_tree_or_a_table_and_writes_page_and_pictures(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--html", "r.html", "--svg", "r.svg", "--dot", "r.dot"]
    assert main(["transform", target, *files]) == 0
    printed = capsys.readouterr().out
    assert "├── fc1  Linear" in printed
    assert "scale-gradients        3           0      100.0%" in printed
    assert "\x1b" not in printed
    for name, start in (("r.html", "<!doctype html>"), ("r.svg", "<svg "), ("r.dot", "digraph")):
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    assert main(["transform", target, "--table"]) == 0
    assert "created: fc1_weight" in capsys.readouterr().out


def test_a_model_file_may_import_what_lies_beside_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "beside_it.py").write_text("from torch import nn\nWIDTH = 3\n", encoding="utf-8")
    source = "from beside_it import WIDTH, nn\nmodel = nn.Linear(WIDTH, 2)\n"
    (folder / "uses_beside.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["transform", "models/uses_beside.py:model"]) == 0
    assert "6 factors" in capsys.readouterr().out
    for name in ("beside_it", "uses_beside"):
        sys.modules.pop(name, None)


def test_plot_draws_what_a_monitor_wrote(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bio_model, _ = biofx.transform(torch.nn.Linear(4, 2))
    monitor = biofx.Monitor(path=tmp_path / "run.jsonl")
    monitor.record(bio_model)
    monitor.close()
    assert main(["plot", "run.jsonl"]) == 0
    assert main(["plot", "run.jsonl", "--layers", "--out", "layers.svg"]) == 0
    assert capsys.readouterr().out == "wrote run.png\nwrote layers.svg\n"
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "layers.svg").read_text(encoding="utf-8")


def test_a_stream_without_unicode_gets_what_it_can_show(target: str) -> None:
    calls = "; ".join(f"main(['transform', {target!r}{options}])" for options in ("", ", '--table'"))
    done = subprocess.run(
        [sys.executable, "-c", f"from biofx.cli import main; {calls}"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"},
        capture_output=True,
        check=True,
    )
    assert b"|-- fc1  Linear" in done.stdout.replace(b"+--", b"|--")
    assert b"created: fc1_weight" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_transform_takes_passes_config_overrides_and_a_module_path(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biofx.BioConfig(weight_splitting_Gamma=2, fuzzy_learning_rate_factor_nu=0).to_toml(
        tmp_path / "config.toml"
    )
    options = ["--config", "config.toml", "--override", "fc2", "weight_splitting_Gamma=3", "--graph"]
    assert main(["transform", "mymodels:instance.fc1", "--passes", "scale-gradients{nu=0.1}"]) == 0
    assert "scale-gradients{nu=0.1}" in capsys.readouterr().out
    assert main(["transform", "mymodels:Net", *options]) == 0
    printed = capsys.readouterr().out
    assert "rows=3" in printed
    assert "scale-gradients" not in printed


def test_print_changed_shows_each_pass(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["transform", target, "--set", "weight_splitting_Gamma=2", "--print-changed"])
    printed = capsys.readouterr().out
    assert printed.index("after split-weights") < printed.index("after scale-gradients")


def test_diff_of_an_unchanged_graph_says_so(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transform", target, "--set", "fuzzy_lr_distribution=baseline", "--diff"]) == 0
    assert "(the graph is unchanged)" in capsys.readouterr().out


def test_passes_lists_every_pass_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, cls in biofx.rewriting.available_passes().items():
        assert name in printed
        assert all(f"{option}=" in printed for option in cls.option_names())
    nu = "Spread of the learning-rate factors around 1, dimensionless. Expected: a number in [0, 1]."
    assert f"{nu} In a config: fuzzy_learning_rate_factor_nu." in printed
    assert all(f" {name}=" in printed for name, found in config_options().items() if not found.feeds)
    assert "``" not in printed


def test_explain_tells_matches_near_misses_and_winning_overrides(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "--override",
        "fc*",
        "weight_splitting_Gamma=2",
        "--override",
        "fc1",
        "weight_splitting_Gamma=3",
    ]
    assert main(["explain", target, "fc1", *overrides]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "fc1 picks 1 nodes" in printed
    assert "split-weights applied: 2 groups of 3 of its 6 output channels summed" in printed
    assert "nearly picked: fc3, fc2" in printed
    assert "weight_splitting_Gamma = 3 from fc1 (over 2 from fc*)" in printed


def test_a_model_that_stays_in_python_is_told_with_the_line(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transform", "mymodels:Branching"]) == 0
    told = "".join(capsys.readouterr().out.split())
    assert "1moduleskeeptheireagerforward" in told
    assert "mymodels.py:15" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transform", "nowhere:Net"], "cannot import 'nowhere': ModuleNotFoundError"),
        (["transform", "nowhere.py:Net"], "expected a Python file, found none at 'nowhere.py'"),
        (["transform", "mymodels"], "expected MODULE:NAME or FILE.py:NAME, found 'mymodels'"),
        (["transform", "mymodels:Nett"], "'mymodels' has no 'Nett'; did you mean 'Net'"),
        (["transform", "mymodels:number"], "to give a torch.nn.Module, found a int"),
        (["transform", "mymodels:needs_width"], "which fails: TypeError: needs_width() missing"),
        (["transform", "mymodels:Net", "--set", "gama=2"], "unknown field 'gama'"),
        (["transform", "mymodels:Net", "--set", "seed"], "expected FIELD=VALUE, found 'seed'"),
        (["transform", "mymodels:Net", "--set", "seed=x"], "seed: expected a whole number in [0, "),
        (["transform", "mymodels:Net", "--only", "fc9"], "selector 'fc9' matches nothing; did you mean"),
        (["transform", "mymodels:Net", "--passes", "split{"], "malformed pipeline text"),
        (["transform", "mymodels:Net", "--passes", "split-weight"], "did you mean 'split-weights'"),
        (["transform", "mymodels:Net", "--config", "none.toml"], "none.toml: expected a readable TOML file"),
        (["transform", "mymodels:Net", "--json", "no/such/folder.json"], "directory: 'no/such/folder.json'"),
        (
            ["transform", "mymodels:Net", "--opaque", "fc9"],
            "opaque: expected the path of a module, found 'fc9'",
        ),
        (["explain", "mymodels:Net", "fcc"], "selector 'fcc' matches nothing"),
        (["transform", "mymodels:Net", "--html", "no/such/page.html"], "directory: 'no/such/page.html'"),
        (
            ["transform", "--override", "fc1", "mymodels:Net"],
            "\"SELECTOR: FIELD=VALUE, FIELD=VALUE\", found 'fc1'",
        ),
        (["transform", "mymodels:Net", "--override", "fc1: seed=3"], "seed"),
        (["plot", "nowhere.jsonl"], "nowhere.jsonl"),
        (["demo", "--tasks", "0"], "expected tasks >= 1"),
        (["demo", "--digits", "--epochs", "0"], "expected epochs >= 1"),
        (["demo", "--seeds", "0"], "expected seeds >= 1"),
        (["demo", "--epochs", "3"], "expected --tasks, found --epochs"),
        (["demo", "--digits", "--tasks", "3"], "expected --epochs with --digits, found --tasks"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("biofx: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [[], ["transfrom"], ["transform"], ["demo", "--seed", "x"]])
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: biofx" in capsys.readouterr().err


def test_the_installed_command_runs_and_survives_a_closed_pipe(target: str) -> None:
    command = [sys.executable, "-m", "biofx"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"biofx {biofx.__version__}"
    with subprocess.Popen([*command, "passes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""


def test_names_with_markup_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from torch import nn\nmodel = nn.Sequential()\nmodel.add_module('[red]x', nn.Linear(2, 2))\n"
    (tmp_path / "odd.py").write_text(source, encoding="utf-8")
    assert main(["transform", "odd.py:model", "--diff"]) == 0
    assert "[red]x" in capsys.readouterr().out
    sys.modules.pop("odd", None)


def test_an_example_lets_a_recurrent_network_have_signs(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["transform", target.replace("Net", "Recurrent"), "--set", "apply_dales_principle=true"]
    state = torch.get_rng_state()
    for example, signed in (([], set()), (["--example", "torch.randn(5, 4, 3)"], {"w_rec"})):
        assert main([*command, *example, "--json", "report.json"]) == 0
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        (signs,) = (entry for entry in report["passes"] if entry["name"] == "constrain-signs")
        assert {r["layer"] for r in signs["remarks"] if r["kind"] == "applied"} == signed
    assert torch.equal(state, torch.get_rng_state())
    capsys.readouterr()
    assert (
        main(["explain", target.replace("Net", "Recurrent"), "w_rec", "--example", "torch.randn(5, 4, 3)"])
        == 0
    )
    assert "w_rec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12, 4, 3", "expected torch.randn(12, 4, 3)"),
        ("__import__('os').system('true')", "expected torch.randn(12, 4, 3)"),
        ("torch.rand_n(2)", "torch.randn"),
        ("torch.load('x.pt')", "expected one of torch.randn"),
        ("torch.randn(-2)", "makes no tensor"),
    ],
)
def test_an_example_that_is_no_tensor_is_refused(
    text: str, words: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transform", target, "--example", text]) == 1
    assert words in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "override",
    [
        ["--override", "fc2: weight_splitting_Gamma=3, fuzzy_lr_distribution='normal'"],
        ["--override", "fc2", "weight_splitting_Gamma=3", 'fuzzy_lr_distribution="normal"'],
        [
            "--override",
            "re:fc2: weight_splitting_Gamma=3",
            "--override",
            "re:fc2:fuzzy_lr_distribution=normal",
        ],
        ["--override=fc2: weight_splitting_Gamma = 3,fuzzy_lr_distribution = normal"],
    ],
)
def test_an_override_leaves_the_target_alone_wherever_it_stands(
    override: list[str], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([*override, target, "fc2"], [target, *override, "fc2"], [target, "fc2", *override]):
        assert main(["explain", *arguments]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "2 groups of 3 of its 6 output channels" in printed
        assert "fuzzy_lr_distribution = normal from" in printed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("true", True),
        ("False", False),
        ("None", None),
        ("1_000", 1000),
        ("1e-3", 0.001),
        ("-inf", float("-inf")),
        ('"normal"', "normal"),
        ("'normal'", "normal"),
        ("normal", "normal"),
        ("[[0.5, 0.0], [0.5, 1.0]]", [[0.5, 0.0], [0.5, 1.0]]),
        ("(1, 2)", (1, 2)),
        ("[true, false]", [True, False]),
        ("torch.tanh", "torch.tanh"),
        ("110 011", "110 011"),
        ("2020-01-01", "2020-01-01"),
        ("x = 1\ny = 2", "x = 1\ny = 2"),
        ("", ""),
    ],
)
def test_values_are_spelled_as_in_python_or_toml(text: str, value: object) -> None:
    found = read_value(text)
    assert (found, type(found)) == (value, type(value))


def test_quiet_prints_nothing_and_writes_files(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transform", target, "--quiet", "--diff", "--json", "report.json"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "report.json").stat().st_size > 100
    assert main(["transform", target, "--quiet", "--only", "fc9"]) == 1
    assert "selector 'fc9' matches nothing" in capsys.readouterr().err


def test_color_is_as_asked(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    before = dict(os.environ)
    assert main(["passes", "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[1" in coloured
    assert dict(os.environ) == before
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["passes", "--color", "never"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["passes", "--color", "blue"])


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_the_command_line_reads_its_arguments_before_it_imports_torch(argument: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "biofx", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "biofx.cli.parser" in imported
    assert not {"torch", "rich", "networkx", "biofx.config"} & imported


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "exit codes:\n  0    done" in printed
    assert "3    check found a fault, or diff a difference" in printed


def test_whoever_else_has_the_commands_name_gets_the_same_biofx(tmp_path: Path) -> None:
    script = tmp_path / "biofx"
    script.write_text(
        "import biofx.transform, biofx\nfrom torch import nn\n"
        "model, report = biofx.transform(nn.Linear(2, 2))\n"
        "print(report.modified, 'capture' in dir(biofx), biofx.capture.__name__, biofx.errors.__name__)\n",
        encoding="utf-8",
    )
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert shown == "True True capture biofx.errors\n"


def test_models_of_the_command_line_find_the_door_open(tmp_path: Path) -> None:
    source = "import biofx\nfrom torch import nn\nmodel = biofx.transform(nn.Linear(2, 2)).graph_module\n"
    (tmp_path / "transformed.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "biofx", "explain", "transformed.py:model", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "picks" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("transform", "bisect", "override", "print-changed"))


def test_completion_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 1
    assert "pip install 'biofx[completion]'" in capsys.readouterr().err
