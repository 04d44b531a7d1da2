"""The code of docs/python.md, run as it stands; the notebook beside it has the same."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative prompt moves pictures, five updates move the student, the metric is what it says."""
    monkeypatch.chdir(ROOT)
    found: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), found)
    assert (found["plain"] - found["away"]).abs().max() > 0.1
    assert found["module"].student_steps == 5 and found["own"].student_steps == 2
    expected = torch.stack([picture.mean(0).std() for picture in found["plain"]]).mean()
    assert math.isclose(found["metric"].result()["value"], float(expected), rel_tol=1e-5)
    assert found["metric"].details()["extractor"] == "pixels"


def test_the_notebook_has_the_same_code() -> None:
    cells = json.loads((ROOT / "docs/python.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[1:] == [block.strip("\n") for block in BLOCKS]
