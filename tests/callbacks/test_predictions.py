"""What `predict` leaves: a picture for each prompt, no padding, and a list of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.predictions import PredictionFiles
from callbacks.run_folder import RunFolder


def trainer(folder: Path) -> Any:
    strategy = SimpleNamespace(barrier=lambda name: None)
    return SimpleNamespace(callbacks=[RunFolder(folder)], is_global_zero=True, strategy=strategy)


def batch(*places: int, padding: int | None = None) -> dict[str, Any]:
    """Pictures of one colour, index / 10; `padding` is the position of a place that is not counted."""
    images = torch.stack([torch.full((3, 4, 6), place / 10) for place in places])
    is_padding = torch.arange(len(places)) == (-1 if padding is None else padding)
    return {"images": images, "prompts": [f"prompt é {place}" for place in places],
            "indices": torch.tensor(places), "is_padding": is_padding}  # fmt: skip


def predict(run: Any, *batches: Any) -> None:
    callback: Any = PredictionFiles()
    callback.on_predict_start(run, None)
    for number, outputs in enumerate(batches):
        callback.on_predict_batch_end(run, None, outputs, None, number)
    callback.on_predict_end(run, None)


def test_each_prompt_has_a_picture_and_padding_has_none(tmp_path: Path) -> None:
    predict(trainer(tmp_path), batch(2, 3), batch(1, 0, padding=1))
    folder = tmp_path / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png", "3.png", "predictions.json"]
    listed = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    assert listed == [{"index": n, "prompt": f"prompt é {n}", "file": f"{n}.png"} for n in (1, 2, 3)]
    picture = np.asarray(Image.open(folder / "3.png"))
    assert picture.shape == (4, 6, 3) and abs(int(picture[0, 0, 0]) - 0.3 * 255) <= 1


def test_pictures_of_an_earlier_call_are_replaced(tmp_path: Path) -> None:
    predict(trainer(tmp_path), batch(0, 1))
    (tmp_path / "predictions" / "grid.png").touch()
    predict(trainer(tmp_path), batch(0))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [
        "0.png", "grid.png", "predictions.json",
    ]  # fmt: skip


def test_modules_that_predict_something_else_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="returns no images") as caught:
        predict(trainer(tmp_path), torch.zeros(2), None)
    assert len(caught) == 1
    assert not (tmp_path / "predictions").exists()
