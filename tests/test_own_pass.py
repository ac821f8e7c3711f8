"""The tutorial of a pass of one's own, as it stands in its folder."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tools" / "own_pass"


def test_the_class_has_no_more_than_20_lines_of_code() -> None:
    (definition,) = [
        node
        for node in ast.parse((FOLDER / "bound_rates.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    assert definition.end_lineno is not None
    assert definition.end_lineno - definition.decorator_list[0].lineno + 1 <= 20


def test_the_commands_of_the_tutorial_install_list_and_run_it(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    install, *commands, uninstall = [shlex.split(line) for line in block.splitlines()]
    shutil.copytree(FOLDER, tmp_path / "tools" / "own_pass")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "120"}
    assert (install[:2], uninstall[:2]) == (["pip", "install"], ["pip", "uninstall"])

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", *install, "--quiet", "--target", str(tmp_path / "site"))
    assert [command[0] for command in commands] == ["biofx", "biofx"]
    calls = "; ".join(f"print(main({command[1:]}), '====')" for command in commands)
    listed, shown, rest = run("-c", f"from biofx.cli import main; {calls}").split("0 ====\n")
    assert rest == ""
    assert "bound-rates" in listed
    assert "Highest rate, in units of the activation." in listed
    assert "+ relu = clamp(stem, 0.0, 1.0)" in shown
    assert "✓ bound-rates: bounded by 1.0" in shown
    assert "· bound-rates: excluded by 'block2'" in shown
