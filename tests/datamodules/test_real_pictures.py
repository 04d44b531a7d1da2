"""Real pictures: which are drawn, in what form, and words about folders that don't fit."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from common.errors import UserError
from datamodules.picture_datasets import PictureDataset
from datamodules.prompts import PromptDataModule
from datamodules.real_pictures import RealPictures, RealPictureSource


def no_codec() -> str:
    raise AssertionError("pictures of a folder have no codec")


@pytest.fixture
def settings(tmp_path: Path) -> RealPictures:
    """Five pictures, not square, which the table names in another order than that of their names."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in (3, 0, 4, 1, 2):
        image = Image.new("RGB", (24, 20), (255, 255, 255))
        image.paste((40 * number, 10, 200), (2, 0, 22, 20))  # the sides are cut off
        image.save(folder / f"{number}.png")
        rows.append(json.dumps({"file": f"{number}.png", "caption": f"cup {number}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    return RealPictures(str(folder), str(tmp_path / "captions.jsonl"), "file")


def test_pictures_and_captions_belong_together(settings: RealPictures) -> None:
    source = RealPictureSource(settings, side=8)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.5, 1 - 2**-24])
    pictures, captions, _ = source.take(uniform)
    assert captions == ["cup 3", "cup 3", "cup 0", "cup 4", "cup 2"]
    assert pictures.shape == (5, 3, 8, 8) and pictures.dtype == torch.float32
    colours = torch.tensor([[40 * number, 10, 200] for number in (3, 3, 0, 4, 2)]) / 255
    assert torch.equal(pictures, colours[:, :, None, None].expand(-1, -1, 8, 8))
    assert len(source.files) == 5
    assert "not image-free: it also sees 5 captioned pictures" in source.notice
    assert source.trained_on == "prompts and 5 captioned pictures, so not image-free"


def test_every_number_below_one_is_a_picture(settings: RealPictures) -> None:
    """In float32 a product with many pictures would be rounded up to their number."""
    source = RealPictureSource(settings, side=1)
    source.files, source.captions = source.files[:1] * 2**25, [str(i) for i in range(5)]
    source.captions = [""] * (2**25 - 2) + ["last but one", "last"]
    assert source.take(torch.tensor([1 - 2**-24]))[1] == ["last but one"]


def test_processes_share_the_places(settings: RealPictures) -> None:
    assert torch.cat([settings.places(rank, 2) for rank in range(2)]).tolist() == settings.places().tolist()
    assert settings.places().tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"data\.real\.batch_size is 4: it must be a multiple of the 3"):
        settings.places(0, 3)
    with pytest.raises(UserError, match=r"data\.real\.batch_size is 0"):
        RealPictures("a", "b", batch_size=0)


def test_lines_of_text_belong_to_the_pictures_in_the_order_of_their_names(
    settings: RealPictures, tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(f"line {i}" for i in range(5)))
    source = RealPictureSource(RealPictures(settings.folder, str(tmp_path / "captions.txt")), side=2)
    pictures, captions, _ = source.take(torch.tensor([0.9]))
    assert captions == ["line 4"] and round(float(pictures[0, 0, 0, 0]) * 255) == 160


def test_wrong_folders_are_named(settings: RealPictures, tmp_path: Path) -> None:
    def message(**changed: str) -> str:
        with pytest.raises(UserError) as caught:
            RealPictureSource(RealPictures(**{**vars(settings), **changed}), side=2)
        return str(caught.value)

    assert "none is not a folder of pictures" in message(folder=str(tmp_path / "none"))
    assert "none.csv does not exist" in message(captions=str(tmp_path / "none.csv"))
    assert "no column 'name'" in message(file_column="name")
    (tmp_path / "pictures" / "4.png").unlink()
    assert "'4.png' is not in" in message()
    (tmp_path / "few.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="holds 4 pictures, but there are 2 captions"):
        RealPictureSource(RealPictures(settings.folder, str(tmp_path / "few.txt")), side=2)


def test_they_are_a_key_of_the_data(settings: RealPictures) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    given = {"prompts": ["a", "b"], "batch_size": 2, "eval_captions": ["a"], "eval_size": 1}
    config = parser.parse_object({"data": {**given, "real": vars(settings)}})
    module = parser.instantiate(parser.parse_string(parser.dump(config))).data
    source = module.real_pictures(4, no_codec)
    assert source.settings == settings and source.take(torch.zeros(2))[0].shape == (2, 3, 4, 4)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2, training=True)
    module.setup("fit")
    module.real = RealPictures(settings.folder, settings.captions, batch_size=3)
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        module.setup("fit")
    assert PromptDataModule(**given).real_pictures(4, no_codec) is None


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture whose sides, which the crop cuts off, are white."""
    image, content = Image.new("RGB", size, (255, 255, 255)), io.BytesIO()
    image.paste(colour, (2, 0, size[0] - 2, size[1]))
    image.save(content, "PNG")
    return content.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def packed(kind: str, folder: Path, captions: list[str]) -> str | None:
    """A folder of pictures, one a caption, i-th colour (40 i, 10, 200); returns the column to name."""
    folder.mkdir()
    contents = [jpeg((40 * i, 10, 200)) for i in range(len(captions))]
    if kind == "webdataset":
        for shard in range(2):  # every other sample
            files = {}
            for i in range(shard, len(captions), 2):
                files |= {f"{i}.png": contents[i], f"{i}.txt": captions[i].encode()}
            tar(folder / f"{shard}.tar", files)
        return None
    if kind == "webdataset, json":
        files = {}
        for i, text in enumerate(captions):
            files |= {f"{i}.png": contents[i], f"{i}.json": json.dumps({"id": i, "long": text}).encode()}
        tar(folder / "all.tar", files)
        return "json.long"
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": contents, "caption": captions}, features=features)
    if kind == "parquet":
        rows.to_parquet(folder / "all.parquet")
    else:
        rows.save_to_disk(folder)
    return None


@pytest.mark.parametrize("kind", ["webdataset", "webdataset, json", "parquet", "saved"])
def test_packed_pictures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture comes with its own caption, cropped as those of a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = [f"cup {i}" for i in range(5)]
    column = packed(kind, tmp_path / "pictures", names)
    settings = RealPictures(str(tmp_path / "pictures"), caption_column=column)
    source = PromptDataModule(real=settings).real_pictures(8, no_codec)
    assert isinstance(source, PictureDataset) and "sees 5 captioned pictures" in source.notice
    pictures, captions, seeds = source.take(torch.tensor([0.0, 0.21, 0.5, 0.7, 1 - 2**-24]))
    assert sorted(captions) == names and seeds is None and pictures.shape == (5, 3, 8, 8)
    for picture, text in zip(pictures, captions):
        colour = torch.tensor([40 * int(text[-1]), 10, 200]) / 255
        assert torch.equal(picture, colour[:, None, None].expand(-1, 8, 8))


def test_packed_pictures_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    packed("parquet", tmp_path / "pictures", ["a cup", "", "a tree"])
    settings = RealPictures(str(tmp_path / "pictures"))
    with pytest.raises(UserError, match="row 2 has no text in column 'caption'"):
        PictureDataset(settings, 8).take(torch.tensor([0.5]))
    with pytest.raises(UserError, match="its 3 rows have image, caption, of them pictures: image"):
        PictureDataset(RealPictures(settings.folder, caption_column="words"), 8)
    (tmp_path / "cut").mkdir()
    tar(tmp_path / "cut" / "0.tar", {"0.png": jpeg((0, 0, 0))[:60], "0.txt": b"a cup"})
    with pytest.raises(UserError, match="cut, row 1 can't be read"):
        PictureDataset(RealPictures(str(tmp_path / "cut")), 8).take(torch.tensor([0.5]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match="can't be read.*fetch or save the files again"):
        PictureDataset(RealPictures(str(tmp_path / "broken")), 8)
