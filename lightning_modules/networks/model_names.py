"""What a user calls a model: NAME[@REVISION][#VARIANT].

    /models/sd21, assets/emoji-sd                       folders, the latter also from the repository
    stabilityai/sdxl-turbo#fp16, /models/sdxl#fp16      the weights in files called ….fp16.safetensors
    PixArt-alpha/PixArt-XL-2-512x512@refs/pr/1          a revision

NAME is a folder or a model of the Hugging Face hub; a revision (branch, tag or commit) is the hub's only.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.files import ROOT, asset_path


@dataclass(frozen=True)
class ModelName:
    """A model as named by the user; without a variant the files of weights without such a mark are taken."""

    name: str
    revision: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return self.name + revision + ("" if self.variant is None else f"#{self.variant}")

    @property
    def options(self) -> dict[str, str]:
        """The keywords of `from_pretrained`."""
        named = {"revision": self.revision, "variant": self.variant}
        return {name: value for name, value in named.items() if value is not None}


def model_name(given: str | Path) -> ModelName:
    """Read NAME[@REVISION][#VARIANT]; an existing path may have these marks in its own name."""
    text = str(given)
    if asset_path(text).exists():
        return ModelName(text)
    before, mark, variant = text.rpartition("#")
    name, revision = before if mark else text, ""
    if not asset_path(name).exists():
        name, at, revision = name.partition("@")
        if at and not revision:
            raise UserError(f"There is no revision behind the @ of {text}. Give e.g. owner/model@main.")
        if at and asset_path(name).exists():
            raise UserError(f"{name} is a folder here, which has no revisions. Leave @{revision} out.")
    if mark and not variant:
        raise UserError(f"There is no variant behind the # of {text}. Give e.g. owner/model#fp16.")
    return ModelName(name, revision or None, variant if mark else None)


def is_bundled(given: str | Path) -> bool:
    """Whether a model is one of those in assets/."""
    return asset_path(model_name(given).name).resolve().is_relative_to(ROOT / "assets")


def lasting_name(given: str | Path) -> str:
    """The name by which a model is found from any working folder: of a folder or file its absolute path.

    What the project brings, and names of the hub, stay as they are.
    """
    wanted = model_name(given)
    place = Path(wanted.name).expanduser()
    if not place.exists() or (ROOT / place).exists() and place.samefile(ROOT / place):
        return str(given)
    return str(replace(wanted, name=str(place.resolve())))


def may_be_hub_name(name: str) -> bool:
    """Whether a name that is no folder here can be one of the hub, owner/model, rather than a mistyped path.

    Asking the hub takes a minute where there is no network.
    """
    parent = name.split("/")[0]
    local = name.startswith((".", "/", "~")) or parent in ("assets", "runs", "outputs")
    return name.count("/") == 1 and not local and not asset_path(parent).is_dir()
