"""What `pip install .` installs works as a tool from any folder, without the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["commands", "callbacks", "reports", "lightning_modules", "datamodules", "common"]
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "outputs", "build", "*.egg-info", "__pycache__")

ELSEWHERE = """
import cli
from commands.config_files import content_of
from common.errors import UserError
from lightning_modules.guidance import negative_prompting

print(cli.__file__)
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
assert callable(negative_prompting)
assert content_of("configs/experiment/emoji_nasat.yaml")["model"]["init_args"]["teacher"] == "assets/emoji-sd"
try:
    cli.main(["generate", "--prompt", "a red apple", "--output", "pictures"])
except UserError as error:
    print("told:", error)
cli.main(["fit", "--config", "configs/quickstart.yaml", "--print_config"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel; from a copy, as a build leaves folders behind that the next one would take up."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "copy")], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_files(wheel: zipfile.ZipFile) -> None:
    """All code, configurations and texts; no tests, no models."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = [ROOT / "cli.py", *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "reports/templates").iterdir()]
    wanted += [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    wanted += [file for kind in ("*.txt", "*.jsonl", "README.md") for file in (ROOT / "assets").glob(kind)]
    wanted += (ROOT / "assets/cache").iterdir()
    assert names == {file.relative_to(ROOT).as_posix() for file in wanted}


def test_the_tool_is_called_by_its_name(wheel: zipfile.ZipFile) -> None:
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "one-step-distillation = cli:main" in wheel.read(entry_points).decode()


def test_runs_from_another_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    wheel.extractall(installed)
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(installed / "cli.py") in done.stdout and "encode-prompts" in done.stdout
    assert re.search(
        r"told: .*assets/emoji-sd-swiftbrush .*not part of the installed package: clone", done.stdout
    )
    assert "high: 4.0" in done.stdout, "the quickstart's"
    assert not list(here.iterdir())


def imported(folder: Path) -> set[str]:
    """Distributions that the Python files below a folder import, in the spelling of pyproject.toml."""
    modules = set()
    for file in [folder] if folder.is_file() else folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    ours = {*ROOMS, "cli", "tests", "benchmarks", "scripts"}
    names = packages_distributions()
    found = (names.get(module, [module])[0] for module in modules - ours - set(sys.stdlib_module_names))
    return {spelling(name) for name in found}


def spelling(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        name: {spelling(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]
        for name, lines in {"": project["dependencies"], **extras}.items()
    }
    test, own = declared.pop("test"), set().union(*declared.values())
    code = set().union(*(imported(ROOT / room) for room in (*ROOMS, "cli.py")))
    assert code <= own, f"not declared: {sorted(code - own)}"
    more = set().union(*(imported(ROOT / room) for room in ("tests", "benchmarks", "scripts")))
    assert more <= own | test, f"not declared: {sorted(more - own - test)}"
