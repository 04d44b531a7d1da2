"""What `fit --help` prints: the configurations there are, the keys that people change, where the rest is.

It is text, so that it comes at once; `--help-all` has jsonargparse write out every option of the Trainer.
"""

from textwrap import wrap

from common.files import ROOT

KEYS = {
    "model.teacher": "the model to distil: a diffusers folder or a hub name",
    "model.objective.guidance_scale": "κ, the teacher's guidance scale",
    "model.start_timestep": "T, at which the student is called",
    "model.student_init": "one-step model to start from (null: the teacher)",
    "model.student.optimizer.lr": "its learning rate; model.fake_score.optimizer.lr likewise",
    "model.fake_score.lora.rank": "size of the fake score's adapter",
    "model.ema_decay": "of the student's moving average; null for none",
    "data.prompts": "training prompts: a text file or a table (docs/prompts.md)",
    "data.batch_size": "prompts per student update, over all processes",
    "data.micro_batch_size": "prompts per process and pass: fewer need less memory",
    "data.eval_captions": "what is drawn and measured: a text file",
    "trainer.max_steps": "student updates",
    "trainer.val_check_interval": "updates between validations",
    "trainer.devices": "GPUs; also trainer.accelerator and trainer.precision",
    "trainer.callbacks.Evaluation.final_size": "captions of the last evaluation; so any callback's keys",
}
"""Keys as they are written on the command line."""


def text(command: str, description: str) -> str:
    """The short help of a command of the Trainer."""
    option = "--trainer.max_steps 100" if command == "fit" else "--ckpt_path best"
    lines = [
        f"usage: python cli.py {command} --config FILE [--config FILE …] [--KEY VALUE …]", "",
        f"{description}. Later files and options win:",
        f"  python cli.py {command} --config configs/quickstart.yaml {option}", "",
        "Configurations, in configs/ (what they are: configs/README.md):",
    ]  # fmt: skip
    for folder in ("", "experiment/", "data/", "trainer/", "pretraining/"):
        names = " ".join(sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")))
        lines += wrap(names, 100, initial_indent=f"  {folder:<13}", subsequent_indent=" " * 15)
    lines += ["", "What people change (in a file, what is below a class stands in its init_args):"]
    lines += [f"  --{key:<41}{help_}" for key, help_ in KEYS.items()]
    return "\n".join([
        *lines,
        "  --ckpt_path last                           go on; or best, a .ckpt file, a run folder",
        "  --experiment NAME, --seed_everything N     name of the run's folder; seed of all random numbers",
        "",
        "Everything else: --help-all (the Trainer's options), --model.help, --data.help, --print_config.",
        "Symbols (κ, ϕ, α, τ, λ): lightning_modules/README.md.",
    ])  # fmt: skip
