"""Tries bad inputs and faults on the program and counts those it takes well (docs/reliability.md).

    python scripts/reliability.py                   # all of it, on the bundled models
    python scripts/reliability.py --only numbers    # one row, every answer printed

A bad input is handled if the command ends with one message, exit status 2, no traceback, nothing written and
no code run. A fault is survived if the run says what happened and goes on to its end afterwards (or, of a
damaged file, if that is refused). Every input gets a process of its own, forked from one that has imported
everything. Exit status 0 only if all are handled and survived.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from common.errors import UserError  # noqa: E402

SECONDS = 120  # for one input
ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1.0e-4}}
TINY: dict[str, Any] = {
    "model": {
        "class_path": "lightning_modules.distillation.OneStepDistillation",
        "init_args": {
            "teacher": str(ROOT / "assets/emoji-sd"), "start_timestep": 625, "ema_decay": 0.9,
            "objective": {"class_path": "lightning_modules.objectives.swiftbrush.SwiftBrush",
                          "init_args": {"guidance_scale": 4.0}},
            "student": {"optimizer": ADAM},
            "fake_score": {"optimizer": ADAM, "lora": {"rank": 4, "alpha": 8, "targets": ["to_q"]}},
        },
    },
    "data": {
        "class_path": "datamodules.prompts.PromptDataModule",
        "init_args": {"prompts": ["a red apple", "a blue car", "a panda"], "batch_size": 2,
                      "eval_captions": ["a red apple"], "eval_size": 1, "eval_batch_size": 1},
    },
    "trainer": {
        "max_steps": 2, "accelerator": "cpu", "val_check_interval": 1000, "log_every_n_steps": 1,
        "callbacks": [{"class_path": "callbacks.checkpoint.RunCheckpoint",
                       "init_args": {"every_n_steps": 1, "monitor": None}}],
    },
}  # fmt: skip


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


# --- inputs: (name, the words of the command line), prepared in the working folder ------------------------


def fit(*words: str) -> list[str]:
    """A command line of `fit`."""
    return ["fit", "--config", "tiny.yaml", *words]


def numbers() -> Iterator[tuple[str, list[str]]]:
    """Numbers out of range."""
    optimizer = "--model.init_args.student.optimizer.init_args"
    for option, values in {
        f"{optimizer}.lr": ("-1", ".nan", ".inf"), f"{optimizer}.betas": ("[1.0, 0.9]", "[0.9, -1]"),
        f"{optimizer}.eps": ("-1",), "--seed_everything": ("-1", "4294967296"),
        "--data.init_args.num_workers": ("-1", "1000"), "--data.init_args.batch_size": ("0", "4"),
        "--data.init_args.eval_size": ("0", "9"), "--trainer.val_check_interval": ("0", "0.5", "-2"),
        "--trainer.max_steps": ("1e30", "-1", "-5"), "--trainer.max_epochs": ("1",),
        "--trainer.check_val_every_n_epoch": ("1",), "--trainer.log_every_n_steps": ("-1",),
        "--trainer.limit_val_batches": ("-1",), "--trainer.devices": ("0", "-3"),
        "--model.init_args.fake_score.lora.rank": ("0", "-1", "100000"), "--model.init_args.fake_score.lora.alpha": ("0", ".nan"),
        "--model.init_args.start_timestep": ("-1", "5000"), "--model.init_args.ema_decay": ("1.5", ".nan"),
        "--model.init_args.student.clip_norm": ("-1", ".nan"), "--model.init_args.decode_slice": ("0",),
        "--model.init_args.student.warmup_steps": ("-1",),
        "--model.init_args.objective.init_args.guidance_scale": (".nan", ".inf"),
    }.items():  # fmt: skip
        yield from ((f"{option.rpartition('.')[2]} {value}", fit(f"{option}={value}")) for value in values)
    for option, values in {
        "--steps": ("0", "-1", "1000000"), "--num-images": ("0", "1000000000"),
        "--seed": ("-1", "18446744073709551616"), "--negative-scale": ("nan", "-1", "inf"),
    }.items():  # fmt: skip
        yield from ((f"generate {option} {v}", ["generate", "--prompt", "x", option, v]) for v in values)
    model = ["evaluate", "--model", str(ROOT / "assets/emoji-sd-swiftbrush"), "--output", "out"]
    for option, values in {
        "--count": ("0", "-1", "1000000000"), "--batch-size": ("0",), "--guidance-scale": ("nan", "inf"),
        "--device": ("foo", "cuda:77", ""), "--steps": ("100000",), "--min-reference": ("-1",),
    }.items():  # fmt: skip
        yield from ((f"evaluate {option} {value!r}", [*model, option, value]) for value in values)
    merge = ["merge", "--first", str(ROOT / "assets/emoji-sd"), "--second", str(ROOT / "assets/emoji-sd")]
    for option, values in {"--weight": ("nan", "inf"), "--evaluate": ("0:1:0", "1:0:0.1", "x")}.items():
        yield from (
            (f"merge {option} {value}", [*merge, "--output", "out", option, value]) for value in values
        )


def paths() -> Iterator[tuple[str, list[str]]]:
    """Names that no file can have, and places that can't be written."""
    os.symlink("loop", "loop")
    Path("file").write_text("x")
    odd = {"a loop": "loop/x", "too long": "x" * 300, "too deep": "x/" * 3000, "in a file": "file/x",
           "in /proc": "/proc/x"}  # fmt: skip
    student = str(ROOT / "assets/emoji-sd-swiftbrush")
    for name, value in odd.items():
        yield f"generate --output {name}", ["generate", "--prompt", "x", "--output", value]
        yield f"generate --model {name}", ["generate", "--prompt", "x", "--model", value]
        yield f"generate --prompts-file {name}", ["generate", "--prompts-file", value]
        yield f"export --checkpoint {name}", ["export", "--checkpoint", value, "--output", "out"]
        yield (
            f"evaluate --images {name}",
            ["evaluate", "--images", value, "--captions", "file", "--output", "o"],
        )
        yield f"evaluate --output {name}", ["evaluate", "--model", student, "--count", "1", "--output", value]
        yield f"fit --ckpt_path {name}", fit("--ckpt_path", value)
        yield f"fit --data.prompts {name}", fit(f"--data.init_args.prompts={value}")
        yield f"fit default_root_dir {name}", fit(f"--trainer.default_root_dir={value}")
        yield f"fit --config {name}", ["fit", "--config", value]
    yield "bytes that are no text", ["generate", "--prompt", os.fsdecode(b"\xff\xfe")]
    yield "no such command", ["trian"]
    yield "no such option", ["generate", "--promt", "x"]


def tables() -> Iterator[tuple[str, list[str]]]:
    """Files of prompts."""
    import pyarrow as pa
    import pyarrow.parquet

    files = {
        "other.txt": b"\xff\xfea\x00", "empty.txt": b"", "blank.txt": b"\n \n", "header.txt": b"id;prompt\n1;a\n",
        "tabs.txt": b"prompt\tid\na\t1\n", "cut.csv": b'id,prompt\n1,"a', "fields.csv": b"id,prompt\n1,a\n2\n",
        "comma.tsv": b"id,prompt\n1\n", "other.csv": b"id;name\n1;x\n", "two.csv": b"prompt,text\na,b\n",
        "none.csv": b"", "utf16.csv": "id,prompt\n1,a\n".encode("utf-16"), "cut.jsonl": b'{"prompt": "a',
        "number.jsonl": b'{"prompt": 3}\n', "list.jsonl": b"[1]\n", "deep.jsonl": b"[" * 100_000,
        "deep.json": b'{"a":' * 100_000, "object.json": b"{}", "text.json": b'"x"', "cut.json": b'[{"prompt":',
        "half.json": b'["a \\ud83d"]', "no.parquet": b"PAR1", "text.parquet": b"a prompt\n",
        "no.csv.gz": b"prompt\na\n", "no.txt.zst": b"a\n", "line.txt": b"x" * 2_000_000,
        "field.csv": b'prompt\n"' + b"x" * 2_000_000 + b'"\n', "annotations.json": b'{"annotations": 3}',
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_bytes(content)
        yield f"prompts {name}", fit(f"--data.init_args.prompts={name}", "--data.init_args.batch_size=1")
    pa.parquet.write_table(pa.table({"prompt": [1, 2]}), "numbers.parquet")
    yield "prompts numbers.parquet", fit("--data.init_args.prompts=numbers.parquet")
    for name, text in {
        "yes": "[yes, a cat]", "year": "[1980, a cat]", "null": "[null, a cat]", "none": "[]", "blank": "['']",
        "nested": "[[a], [b]]", "weights": "[{path: a.txt, weight: -1}]", "keys": "[{file: a.txt}]",
    }.items():  # fmt: skip
        Path(f"list-{name}.yaml").write_text(f"data: {{init_args: {{prompts: {text}}}}}")
        yield f"list of prompts: {name}", fit("--config", f"list-{name}.yaml")


def pictures() -> Iterator[tuple[str, list[str]]]:
    """Folders of pictures with captions."""
    Path("caps.txt").write_text("a cat\na dog\n")
    grey = np.zeros((8, 8))
    images = [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}]
    annotations = [{"image_id": i, "caption": f"cat {i}"} for i in (1, 2)]
    Path("whole.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    Path("part.json").write_text(json.dumps({"annotations": annotations}))
    Path("others.json").write_text(json.dumps({"images": images[:1], "annotations": annotations}))
    Path("table.csv").write_text("id;caption\n1;a cat\n2;a dog\n")
    for name, save in {
        "float": lambda p: Image.fromarray(grey.astype(np.float32)).save(p / "0.tif"),
        "32 bits": lambda p: Image.fromarray(grey.astype(np.int32)).save(p / "0.tif"),
        "cut": lambda p: (p / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
        "text": lambda p: (p / "0.jpg").write_text("no picture"),
        "of a size of its own": lambda p: (p / "0.ppm").write_bytes(b"P6\n100000 100000\n255\n"),
    }.items():  # fmt: skip
        folder = Path(name)
        folder.mkdir()
        save(folder)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
        yield name, ["evaluate", "--images", name, "--captions", "caps.txt", "--output", "out"]
    Path("good").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(f"good/{i}.png")
    coco = ["--data", "datamodules.published_sets.CocoCaptions"]
    for name, words in {
        "annotations without pictures": ["--captions", "part.json", *coco],
        "annotations of others": ["--captions", "others.json", *coco],
        "a table without files": ["--captions", "table.csv"],
        "more captions": ["--captions", str(ROOT / "assets/eval_captions.txt")],
    }.items():
        yield name, ["evaluate", "--images", "good", *words, "--output", "out"]
    np.savez("other.npz", mu=np.zeros(4), sigma=np.eye(4))
    for name in ("other.npz", "caps.txt", "nothing"):
        words = ["--captions", "caps.txt", "--reference", name]
        yield f"reference {name}", ["evaluate", "--images", "good", *words, "--output", "out"]


def models() -> Iterator[tuple[str, list[str]]]:
    """Model folders that are damaged, or another family's."""
    source = ROOT / "assets/emoji-sd"

    def changed(name: str, file: str, **changes: Any) -> str:
        folder = Path(name.replace(" ", "_"))
        shutil.copytree(source, folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))
        return str(folder)

    scheduler, unet, length = (
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "tokenizer/tokenizer_config.json",
    )
    folders = [
        changed("no steps", scheduler, num_train_timesteps=0),
        changed("betas NaN", scheduler, beta_start=float("nan")),
        changed("trained betas none", scheduler, trained_betas=[]),
        changed("prediction", scheduler, prediction_type="x"),
        changed("class labels", unet, class_embed_type="timestep"),
        changed("added time", unet, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64),
        changed("image hints", unet, encoder_hid_dim_type="image_proj", encoder_hid_dim=16),
        changed("no size", unet, sample_size=None), changed("inpainting", unet, in_channels=9),
        changed("length 0", length, model_max_length=0), changed("length 1000", length, model_max_length=1000),
        changed("other pipeline", "model_index.json", _class_name="FluxPipeline"),
        changed("list", "model_index.json", unet=3), changed("os", "model_index.json", scheduler=["os", "path"]),
    ]  # fmt: skip
    for name, file, content in (
        ("deep index", "model_index.json", "[" * 100_000), ("cut weights", "unet/diffusion_pytorch_model.safetensors", "x"),
        ("cut tokenizer", "tokenizer/tokenizer.json", "{"), ("text index", "model_index.json", "[]"),
    ):  # fmt: skip
        folders.append(changed(name, "model_index.json"))
        (Path(folders[-1]) / file).write_text(content)
    folders.append(changed("pickled weights", "model_index.json"))
    (Path(folders[-1]) / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Payload()}, Path(folders[-1]) / "unet/diffusion_pytorch_model.bin")
    for folder in folders:
        yield f"generate: {folder}", ["generate", "--model", folder, "--prompt", "x", "--output", "out"]
        if folder != "other_pipeline":  # which holds the parts of one that is known
            yield f"fit: {folder}", fit(f"--model.init_args.teacher={folder}")
    state = {"conv_in.weight": torch.ones(1)}
    files: dict[str, Any] = {
        "lora.bin": {"lora_unet_x.lora_down.weight": torch.ones(1)}, "other.bin": state, "list.bin": [1],
        "webui.bin": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "code.bin": Payload(),
        "empty.pt": {}, "nested.pth": {"state_dict": {"model": 3}},
    }  # fmt: skip
    for name, content in files.items():
        torch.save(content, name)
        words = ["--base", str(source), "--start-timestep", "999", "--output", "out"]
        yield f"export {name}", ["export", "--checkpoint", name, *words]


def checkpoints() -> Iterator[tuple[str, list[str]]]:
    """Checkpoints that are damaged, hold other things, or code."""
    run = Path("good/checkpoints/last.ckpt")
    good = torch.load(run, weights_only=True)
    damaged = bytearray(run.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 200] = bytes(200 * [170])
    files: dict[str, Any] = {
        "damaged": bytes(damaged),
        "cut": bytes(damaged[:-1000]),
        "empty": b"",
        "text": b"x",
    }
    facts = good["one_step"]
    for name, changes in {
        "no weights": {"state_dict": {}, "ema": None}, "weights 3": {"state_dict": 3}, "text weights": {"state_dict": {"student.a": "x"}},
        "one_step list": {"one_step": [1]}, "teacher 3": {"one_step": facts | {"teacher": 3}},
        "no teacher": {"one_step": facts | {"teacher": "nowhere"}}, "start -1": {"one_step": facts | {"start_timestep": -1}},
        "start text": {"one_step": facts | {"start_timestep": "x"}}, "ema 3": {"ema": 3}, "version 99": {"checkpoint_format": 99},
        "architecture": {"one_step": facts | {"architecture": {"_class_name": "os"}}}, "code": {"x": Payload()},
    }.items():  # fmt: skip
        files[name] = {**good, **changes}
    for name, content in files.items():
        file = Path(f"{name.replace(' ', '_')}.ckpt")
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        yield f"export {name}", ["export", "--checkpoint", str(file), "--output", "out"]
        yield f"generate {name}", ["generate", "--model", str(file), "--prompt", "x", "--output", "out"]
        if name not in (
            "no teacher",
            "teacher 3",
            "architecture",
            "start -1",
            "start text",
            "no weights",
            "one_step list",
        ):
            yield f"fit {name}", fit("--ckpt_path", str(file), "--trainer.max_steps=3")
    for name, changes in {
        "step text": {"global_step": "x"},
        "callbacks 3": {"callbacks": 3},
        "loops": {"loops": {}},
        "optimizers 3": {"optimizer_states": 3},
        "no optimizers": {"optimizer_states": []},
    }.items():
        torch.save({**good, **changes}, f"{name.replace(' ', '_')}.ckpt")
        yield f"fit {name}", fit("--ckpt_path", f"{name.replace(' ', '_')}.ckpt", "--trainer.max_steps=3")
    for name, index in {
        "code": pickle.dumps(Payload()),
        "a cut index": b"\x80\x04",
        "no index": None,
    }.items():
        folder = Path(f"shards_{name.replace(' ', '_')}.ckpt")
        folder.mkdir()
        torch.save({"global_step": 1, "state_dict": {}, "one_step": {}}, folder / "meta.pt")
        if index is not None:
            (folder / ".metadata").write_bytes(index)
        yield f"export shards, {name}", ["export", "--checkpoint", str(folder), "--output", "out"]
        yield (
            f"consolidate shards, {name}",
            ["consolidate", "--checkpoint", str(folder), "--output", "one.ckpt"],
        )
        yield f"fit shards, {name}", fit("--ckpt_path", str(folder))


def configurations() -> Iterator[tuple[str, list[str]]]:
    """YAML files."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for name, content in {
        "bytes": b"\xff\xfe\x00", "bomb": bomb.encode(), "deep": b"[" * 10_000, "deep_map": b"{a: " * 3_000,
        "list": b"- a\n", "text": b"hello", "tabs": b"a:\n\tb: 1\n", "unknown_interpolation": b"trainer: {max_steps: '${nothing}'}",
        "environment": b"trainer: {max_steps: '${oc.env:NOT_SET_ANYWHERE}'}", "circle": b"base: circle.yaml",
        "self": b"model: ${model}", "no_base": b"base: nothing.yaml", "python": b"a: !!python/object/apply:os.system ['touch ran']",
        "misspelt": b"trainer: {max_step: 3}", "class": b"model: {class_path: nothing.Nothing}",
        "number": b"data: {init_args: {batch_size: many}}", "nul": b"a: \x00",
    }.items():  # fmt: skip
        Path(f"{name}.yaml").write_bytes(content)
        yield f"fit {name}", fit("--config", f"{name}.yaml", "--trainer.val_check_interval=1")
        if name not in ("number", "misspelt", "stopping", "class"):
            yield f"sweep {name}", ["sweep", "--config", f"{name}.yaml"]
            yield f"evaluate {name}", ["evaluate", "--config", f"{name}.yaml", "--output", "out"]


INPUTS = (numbers, paths, tables, pictures, models, checkpoints, configurations)


def answer(words: list[str]) -> tuple[str, str]:
    """What a command line ends with, in a process of its own: "message", "accepted", …; and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            code = 0
            try:
                cli.main(words)
            except UserError as error:
                print(f"error: {error}")
                code = 2
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        text = said.read()
    names = {0: "accepted", 2: "message", 70: "traceback", -signal.SIGALRM: f"no end in {SECONDS} s"}
    return names.get(status, f"status {status}"), text


def try_inputs(
    kind: Callable[[], Iterator[tuple[str, list[str]]]], place: Path, loud: bool
) -> tuple[int, int]:
    """Numbers of handled and of tried inputs; prints those that are not handled, or all."""
    place.mkdir()
    os.chdir(place)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    if kind is checkpoints:
        done, text = answer(fit("--trainer.default_root_dir=.", "--experiment=run"))
        assert done == "accepted", text
        Path("run/version_0").rename("good")
    handled = tried = 0
    for name, words in kind():
        found, text = answer(words)
        left = [path for path in ("ran", "out", "runs") if Path(path).exists()]
        good = found == "message" and not left
        handled, tried = handled + good, tried + 1
        for path in left:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        if loud or not good:
            last = [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-1:]
            print(
                f"{'' if good else 'NOT HANDLED '}{kind.__name__}, {name}: {found} {left or ''} {last}",
                flush=True,
            )
    return handled, tried


# --- faults: what is done to a run, and whether it goes on afterwards ---------------------------------------

STEPS = 12


class Process:
    """A command line in a process of its own, forked from this one."""

    def __init__(self, words: list[str], prepare: Callable[[], None] = lambda: None) -> None:
        self.log, self.status = Path(f"{len(list(Path().glob('*.log')))}.log"), None
        if (pid := os.fork()) == 0:
            output = os.open(self.log, os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.alarm(3 * SECONDS)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
            prepare()
            sys.argv = ["cli.py", *words]
            code = 0
            try:
                cli.main()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            os._exit(code)
        self.pid = pid

    def runs(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def until(self, happened: Callable[[], Any]) -> Process:
        """Wait until something has happened, or the process has ended."""
        while not happened() and self.runs():
            time.sleep(0.01)
        return self

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, if one is given; exit status and output."""
        if number is not None:
            os.kill(self.pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.log.read_text()


def resumed(*words: str) -> bool:
    """Whether the run goes on to its end, with each step once in metrics.csv."""
    status, _ = Process(fit("--ckpt_path", "last", f"--trainer.max_steps={STEPS}", *words)).end()
    rows = Path("runs/tiny/version_0/metrics.csv").read_text().splitlines()[1:]
    steps = [row.split(",")[0] for row in rows]
    return status == 0 and len(set(steps)) == len(steps) and steps[-1:] == [str(STEPS)]


def told(result: tuple[int, str], *words: str) -> bool:
    """Whether a process ended with one message that says this."""
    return result[0] == 2 and "Traceback" not in result[1] and any(word in result[1] for word in words)


def faults() -> Iterator[tuple[str, bool]]:
    """Name of each fault, and whether the program came through it."""
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    begin = fit(f"--trainer.max_steps={STEPS}")

    def fresh(*words: str, prepare: Callable[[], None] = lambda: None) -> Process:
        shutil.rmtree("runs", ignore_errors=True)
        return Process([*begin, *words], prepare).until(last.exists)

    for wait in (0.0, 0.2, 0.5):
        run = fresh()
        time.sleep(wait)
        status, _ = run.end(signal.SIGKILL)
        yield f"SIGKILL {wait} s after the first checkpoint", resumed()
    status, text = fresh().end(signal.SIGTERM)
    yield "SIGTERM", status == 128 + signal.SIGTERM and "Traceback" not in text and resumed()
    status, text = fresh().end(signal.SIGINT)
    yield "Ctrl-C in training", status != 0 and "Traceback" not in text and resumed()
    shutil.rmtree("runs")
    run = Process(begin)
    time.sleep(0.5)
    status, text = run.end(signal.SIGINT)
    yield "Ctrl-C in set-up", status == 130 and "interrupted" in text and "Traceback" not in text
    run = fresh()
    while Path("runs").exists() and run.runs():
        shutil.rmtree("runs", ignore_errors=True)
    yield "run folder removed", told(run.end(), "bring it back", "gone")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit()

    yield "file system full", told(fresh(prepare=full).end(), "make room")
    run = fresh("--data.init_args.num_workers=1")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    yield "data worker killed", bool(children) and told(run.end(), "num_workers") and resumed()
    run = fresh()
    second = Process(fit("--ckpt_path", "last", f"--trainer.max_steps={STEPS}")).end()
    yield "second process in the folder", told(second, "another process") and run.end()[0] == 0
    good = last.read_bytes()
    for name, content in {
        "200 bytes of the checkpoint overwritten": good[: len(good) // 2] + bytes(200) + good[len(good) // 2 + 200 :],
        "checkpoint cut short": good[:-5000], "checkpoint empty": b"",
    }.items():  # fmt: skip
        last.write_bytes(content)
        again = Process(fit("--ckpt_path", "last", f"--trainer.max_steps={STEPS + 1}")).end()
        yield name, told(again, "check sum", "can't be read")
    last.write_bytes(good)
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00", b""):
        Path("runs/tiny/version_0/metrics.csv").write_bytes(content)
        yield (
            f"metrics.csv is {content!r}",
            Process(fit("--ckpt_path", "last", f"--trainer.max_steps={STEPS + 1}")).end()[0] == 0,
        )
        last.write_bytes(good)
    for command in (
        ["generate", "--prompt", "x", "--num-images", "64"],
        ["export", "--checkpoint", str(last)],
    ):
        words = [*command, "--output", "result"]
        run = Process(words).until(lambda: list(Path().glob(".result.new-*")))
        run.end(signal.SIGKILL)
        ended = Process(words).end()[0] == 0
        yield f"{command[0]} killed while it writes", ended and not list(Path().glob(".result.*"))
        shutil.rmtree("result")


def try_faults(place: Path) -> tuple[int, int]:
    """Numbers of survived and of tried faults; prints each."""
    place.mkdir()
    os.chdir(place)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    survived = tried = 0
    for name, good in faults():
        survived, tried = survived + good, tried + 1
        print(f"{'' if good else 'NOT SURVIVED '}fault: {name}", flush=True)
    return survived, tried


def main() -> None:
    """Try all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[kind.__name__ for kind in INPUTS] + ["faults"])
    chosen = parser.parse_args().only
    from commands.fit import import_components

    import_components()
    rows, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"HF_HUB_OFFLINE": "1", "ONE_STEP_CACHE": f"{root}/cache", "HOME": root}
        for kind in INPUTS:
            if chosen in (None, kind.__name__):
                counts = try_inputs(kind, Path(root) / kind.__name__, loud=chosen is not None)
                rows.append((kind.__doc__ or "", *counts))
        if chosen in (None, "faults"):
            rows.append(("Faults during a run", *try_faults(Path(root) / "faults")))
    print(
        f"\n| what | tried | handled |\n|---|---|---|\n{''.join(f'| {t} | {n} | {h} |{chr(10)}' for t, h, n in rows)}"
    )
    print(f"{time.perf_counter() - start:.0f} s")
    raise SystemExit(any(handled < tried for _, handled, tried in rows))


if __name__ == "__main__":
    main()
