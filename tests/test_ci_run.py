"""What continuous integration calls, seen with a stand-in for make."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

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


def test_what_others_read_of_the_project() -> None:
    """The workflow calls .ci/run; version and licence are told alike; the container copies every package."""
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    copied = re.findall(r"^COPY (\S+) ", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= {*copied, "tests"}
