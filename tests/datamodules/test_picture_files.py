"""Pictures on disk: order, pairing with captions, crop and resize, damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from common.errors import UserError
from datamodules.picture_files import (
    Frame,
    match_files,
    picture_files,
    read_picture,
    read_pictures,
    to_picture,
    to_tensor,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (40, 33), (20, 20), (16, 16)])
def test_frame_is_the_published_crop_and_resize(size: tuple[int, int]) -> None:
    image = noise(*size)
    cut = center_crop(image, [min(size), min(size)])
    expected = cut.resize((16, 16), Image.Resampling.LANCZOS) if min(size) != 16 else cut
    assert np.array_equal(np.array(Frame(16).picture(image)), np.array(expected))
    squeezed = Frame(16, crop=False).picture(image)
    assert np.array_equal(np.array(squeezed), np.array(image.resize((16, 16), Image.Resampling.LANCZOS)))


def test_a_batch_is_framed_as_its_files_would_be() -> None:
    image = noise(40, 30)
    batch = Frame(16).batch(to_tensor(image)[None])
    assert torch.equal(batch[0], to_tensor(Frame(16).picture(image)))
    assert np.array_equal(np.array(to_picture(batch[0])), np.array(Frame(16).picture(image)))
    small = torch.rand(2, 3, 16, 16)
    assert Frame(16).batch(small) is small
    with pytest.raises(UserError, match="at least 1 pixel"):
        Frame(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in (0, 2, 10, 1):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"{i}.png")
    (pictures / "grid.png").write_bytes(b"left by generate")
    (pictures / "notes.txt").write_text("no picture")
    return pictures


def reds(files: list[Path]) -> list[int]:
    return [round(float(image[0, 0, 0]) * 255) for image in read_pictures(files)]


def test_pictures_pair_with_lines_in_natural_order(folder: Path) -> None:
    assert [path.stem for path in picture_files(folder)] == ["0", "1", "2", "10"]
    assert reds(match_files(folder, 4)) == [0, 1, 2, 10]
    with pytest.raises(UserError, match="4 pictures, .* 2 captions"):
        match_files(folder, 2)
    (folder / "10.png").rename(folder.joinpath("a").mkdir() or folder / "a" / "10.png")
    Image.new("RGB", (8, 8), (5, 0, 0)).save(folder / "a" / "9.png")
    assert reds(match_files(folder, 5)) == [0, 1, 2, 5, 10]


def test_pictures_pair_with_the_files_that_a_table_names(folder: Path) -> None:
    assert reds(match_files(folder, 2, ["10.png", "1.png"])) == [10, 1]
    with pytest.raises(UserError, match="'3.png' is not in"):
        match_files(folder, 2, ["1.png", "3.png"])


def test_read_pictures_are_framed(folder: Path) -> None:
    assert read_pictures([folder / "1.png"], Frame(4))[0].shape == (3, 4, 4)


def test_a_damaged_picture_is_named(folder: Path) -> None:
    noise(64, 64).save(folder / "1.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])
    files = match_files(folder, 4)
    assert len(read_pictures([files[0], files[2]])) == 2
    with pytest.raises(UserError, match="picture .*1.png can't be read"):
        read_pictures(files)
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match="2.png"):
        read_picture(folder / "2.png")


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        picture_files(tmp_path / "none")
    with pytest.raises(UserError, match="holds no picture"):
        picture_files(tmp_path)


def test_more_than_eight_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    expected = np.array(read_picture(tmp_path / "8.png"))
    for name in ("16.png", "16.tif"):
        assert np.array_equal(np.array(read_picture(tmp_path / name)), expected)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_known_white_are_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif can't be read: it has values of 32 bits .* save 8"):
        read_picture(tmp_path / "a.tif")
