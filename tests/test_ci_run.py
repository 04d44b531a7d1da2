"""What continuous integration calls, seen with a stand-in for make."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("failing", "fails"), [("", False), ("lint", True), ("test", True)])
def test_lint_and_then_the_tests_run_and_both_count(failing: str, fails: bool, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\necho "$@"\n[ "$1" != "{failing}" ]\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{make.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(tmp_path / ".ci" / "run")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["lint", "test"]
    assert (done.returncode != 0) is fails, done.stderr
