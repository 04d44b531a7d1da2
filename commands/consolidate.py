"""`consolidate`: the folder of a checkpoint in shards becomes one .ckpt file."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `consolidate`.

    Args:
        checkpoint: folder that a sharded run wrote
        output: the .ckpt file to write; must not exist
    """

    checkpoint: Path
    output: Path


def run(options: Options) -> None:
    """Write the file, which any number of processes can continue from, without shards too.

    Raises:
        UserError: the folder is no such checkpoint or cannot be read; the file exists or cannot be written.
    """
    import torch

    from common.files import written_whole
    from lightning_modules.checkpoints import check_format, is_sharded, read

    folder, output = options.checkpoint, options.output
    if not is_sharded(folder):
        raise UserError(f"{folder} is not the folder of a checkpoint in shards (it has no meta.pt)")
    if output.suffix != ".ckpt" or output.exists():
        raise UserError(f"--output {output} must be a .ckpt file that does not exist yet")
    content = read(folder)
    check_format(content, folder)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(output) as partial, partial.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output} cannot be written: {first_line(error)}; give another --output") from error
    print(f"Wrote {output} (step {content['global_step']})")
