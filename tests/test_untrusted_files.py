"""No file that a command opens runs code: each holds a payload that leaves a mark when it is run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import CLIPImageProcessor

import cli
from common.errors import UserError
from lightning_modules.checkpoints import read
from lightning_modules.diffusion.steps import Steps
from lightning_modules.networks.clip_models import TransformersClip
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.student import load_network_file, load_student
from lightning_modules.pipelines import load_any_pipeline


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a payload makes."""
    return tmp_path / "ran"


def shards(folder: Path, where: str, payload: object) -> Path:
    """A checkpoint in shards with the payload in its index, in a plain value, or in the file beside."""
    state: dict[str, Any] = {
        "state_dict": {"student.weight": torch.ones(3)},
        "optimizer_0": {
            "state": {"student.weight": {"step": torch.ones(())}},
            "param_groups": [{"lr": payload if where == "value" else 0.1, "params": ["student.weight"]}],
        },
    }
    folder.mkdir(parents=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    facts = {"global_step": 1, "one_step": {}, "extra": payload if where == "meta" else None}
    torch.save(facts, folder / "meta.pt")
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(payload))
    return folder


@pytest.mark.parametrize("where", ["index", "value", "meta"])
def test_no_command_runs_code_from_a_checkpoint_in_shards(
    where: str, mark: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    best = shards(run / "checkpoints" / "best.ckpt", where, Payload(mark))
    monkeypatch.chdir(tmp_path)
    lines = [
        ["generate", "--model", run, "--prompt", "x"],
        ["evaluate", "--model", run, "--count", 8],
        ["export", "--checkpoint", best],
        ["merge", "--first", run, "--second", tiny_sd],
        ["merge", "--first", tiny_sd, "--second", best],
    ]
    for words in lines:
        with pytest.raises(UserError, match="can't be read as a checkpoint"):
            cli.main([*map(str, words), "--output", str(out)])
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        cli.main(["consolidate", "--checkpoint", str(best), "--output", str(tmp_path / "one.ckpt")])
    if where != "value":  # which is read with the weights, by the strategy or by `read`
        for command, limit in (("fit", ["--trainer.max_steps=2"]), ("validate", [])):
            own = [*limit, "--model=tests.tiny_run.TinyModule", "--data=tests.tiny_run.TinyData"]
            with pytest.raises(UserError, match="can't be read as a checkpoint"):
                cli.main([command, *own, "--ckpt_path", str(best)])
    assert not mark.exists() and not out.exists()


def test_shards_without_a_payload_are_read(mark: Path, tmp_path: Path) -> None:
    content = read(shards(tmp_path / "good.ckpt", "nowhere", None))
    assert content["state_dict"]["student.weight"].tolist() == [1, 1, 1]
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "or the tests above mean nothing"


def in_a_checkpoint(folder: Path, base: Path, payload: Payload) -> None:
    torch.save({"one_step": {}, "state_dict": {}, "x": payload}, folder / "last.ckpt")
    load_student(folder / "last.ckpt")


def in_a_network(folder: Path, base: Path, payload: Payload) -> None:
    torch.save({"weight": payload}, folder / "unet.bin")
    load_network_file(folder / "unet.bin", str(base), Steps((9,)))


def in_the_weights_of_a_part(folder: Path, base: Path, payload: Payload) -> None:
    model = Path(shutil.copytree(base, folder / "model"))
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": payload}, model / "unet" / "diffusion_pytorch_model.bin")
    load_parts(model)


def in_the_weights_of_a_text_encoder(folder: Path, base: Path, payload: Payload) -> None:
    model = Path(shutil.copytree(base, folder / "model"))
    (model / "text_encoder" / "model.safetensors").unlink()
    torch.save({"weight": payload}, model / "text_encoder" / "pytorch_model.bin")
    load_parts(model)


def _with_own_code(folder: Path, payload: Payload, settings: str, key: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(f"open({str(payload.mark)!r}, 'w')")
    old = json.loads((folder / settings).read_text()) if (folder / settings).is_file() else {}
    (folder / settings).write_text(json.dumps(old | {"auto_map": {key: "own.Own"}}))


def in_the_code_of_a_clip(folder: Path, base: Path, payload: Payload) -> None:
    model = Path(shutil.copytree(base, folder / "model"))
    clip = model / "text_encoder"
    CLIPImageProcessor().save_pretrained(clip)
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "own", "text_config": config}))
    for name, key in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig"),
                      ("preprocessor_config.json", "AutoImageProcessor")):  # fmt: skip
        _with_own_code(clip, payload, name, key)
    TransformersClip(str(clip))


def in_the_code_of_a_tokenizer(folder: Path, base: Path, payload: Payload) -> None:
    model = Path(shutil.copytree(base, folder / "model"))
    _with_own_code(model / "tokenizer", payload, "tokenizer_config.json", "AutoTokenizer")
    load_parts(model)
    raise UserError("it may be read: by the class that the pipeline names")


def in_the_code_of_a_pipeline(folder: Path, base: Path, payload: Payload) -> None:
    model = Path(shutil.copytree(base, folder / "model"))
    _with_own_code(model, payload, "config.json", "Own")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"_class_name": ["own", "Own"], "unet": ["own", "Own"]})
    )
    load_any_pipeline(str(model))


@pytest.mark.parametrize(
    "opened",
    [in_a_checkpoint, in_a_network, in_the_weights_of_a_part, in_the_weights_of_a_text_encoder,
     in_the_code_of_a_clip, in_the_code_of_a_tokenizer, in_the_code_of_a_pipeline],
)  # fmt: skip
def test_no_other_file_runs_code(
    opened: Callable[[Path, Path, Payload], None], mark: Path, tiny_sd: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError):
        opened(tmp_path, tiny_sd, Payload(mark))
    assert not mark.exists()
