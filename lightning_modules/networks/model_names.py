"""What a user calls a model, NAME[@REVISION][#VARIANT], and where its files are.

    /models/sd21, assets/emoji-sd                       folders, the latter also from the repository
    stabilityai/sdxl-turbo#fp16, /models/sdxl#fp16      the weights in files called ….fp16.safetensors
    PixArt-alpha/PixArt-XL-2-512x512@refs/pr/1          a revision

NAME is a folder or a model of the Hugging Face hub; a revision (branch, tag or commit) is the hub's only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache

from common.errors import UserError, first_line
from common.files import user_cache_dir

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ModelName:
    """A model as named by the user.

    Attributes:
        name: path of a folder or name on the hub.
        revision: of a hub model; None: its main branch.
        variant: which of several sets of weights, e.g. fp16; None: the files without such a mark.
    """

    name: str
    revision: str | None = None
    variant: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """The keywords of `from_pretrained`."""
        named = {"revision": self.revision, "variant": self.variant}
        return {name: value for name, value in named.items() if value is not None}


def asset_path(path: str | Path) -> Path:
    """Resolve a path: as it stands, else relative to the repository (so that `assets/...` works anywhere).

    The path is returned unchanged if neither exists, so that messages name what the user wrote.
    """
    given = Path(path).expanduser()
    if given.exists() or given.is_absolute():
        return given
    bundled = REPOSITORY / given
    return bundled if bundled.exists() else given


def model_name(given: str | Path) -> ModelName:
    """Read NAME[@REVISION][#VARIANT]; an existing path may have these marks in its own name.

    Raises:
        UserError: a mark with nothing behind it, or a revision of a folder.
    """
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


def may_be_hub_name(name: str) -> bool:
    """Whether a name that is no folder here can be one of the hub, owner/model, rather than a mistyped path.

    Asking the hub takes a minute where there is no network.
    """
    parent = name.split("/")[0]
    local = name.startswith((".", "/", "~")) or parent in ("assets", "runs", "outputs")
    return name.count("/") == 1 and not local and not asset_path(parent).is_dir()


def model_folder(given: str | Path, complete: Callable[[Path], None]) -> Path:
    """The folder of a model; one of the hub comes from the local cache, and is fetched if it lacks something.

    With a variant, it is a folder of links in the user cache, where the variant's files have the plain names.

    Args:
        given: see `ModelName`.
        complete: raises a UserError that says what a folder lacks.

    Raises:
        UserError: there is no such folder, hub model or variant; says how to get it.
    """
    wanted = model_name(given)
    folder = asset_path(wanted.name)
    if not folder.exists():
        if not may_be_hub_name(wanted.name):
            raise UserError(f"The model folder {wanted.name} does not exist. Check the path.")
        folder = _hub_folder(wanted, complete)
    return _variant_view(folder, wanted)


def _hub_folder(wanted: ModelName, complete: Callable[[Path], None]) -> Path:
    """A hub model's snapshot: the cached one if nothing is missing there, else what the hub gives."""
    cached = try_to_load_from_cache(wanted.name, "model_index.json", revision=wanted.revision)
    missing = "it is not in the local Hugging Face cache"
    if isinstance(cached, str):
        folder = Path(cached).parent
        try:
            complete(_variant_view(folder, wanted))
            return folder
        except UserError as error:
            missing = f"the local Hugging Face cache has a part of it only: {error}"
    try:
        return Path(DiffusionPipeline.download(wanted.name, **wanted.options))
    except Exception as error:  # the hub client raises many kinds; the cause stays attached
        revision = f" --revision {wanted.revision}" if wanted.revision else ""
        raise UserError(
            f"The model folder {wanted.name} does not exist here, and as a Hugging Face hub name it can't be "
            f"fetched: {first_line(error)} Check the path or the name. Without a network: "
            f"{missing.rstrip('.')}. On a machine that has one: hf download {wanted.name}{revision}"
        ) from error


# --- variants ---------------------------------------------------------------------------------------------


def _variant_view(folder: Path, wanted: ModelName) -> Path:
    """Links to a model's files, with the variant's weights in the place of the plain ones.

    The folder itself if no variant is wanted. Parts without such weights keep theirs, as in diffusers.

    Raises:
        UserError: no part has weights of this variant.
    """
    if (variant := wanted.variant) is None:
        return folder
    files = [Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names]
    names = {file.relative_to(folder): file for file in sorted(files)}
    marked = {name: plain for name in names if (plain := _without_mark(name, variant)) != name}
    if not marked:
        raise UserError(
            f"{folder} has no weights of the variant {variant!r}. Leave #{variant} behind {wanted.name} out."
        )
    parts = {name.parent for name in marked}
    kept = {name: name for name in names if name.parent not in parts or not _is_weight(name)}
    links = {plain: names[name].absolute() for name, plain in (kept | marked).items()}
    facts = [f"{p}|{f}|{f.stat().st_size}|{f.stat().st_mtime_ns}" for p, f in sorted(links.items())]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    view = user_cache_dir() / "variants" / f"{Path(wanted.name).name}-{variant}-{digest}"
    if not view.is_dir():
        _make_view(view, links, variant)
    return view


def _make_view(view: Path, links: dict[Path, Path], variant: str) -> None:
    fresh = view.with_name(f".{view.name}-{uuid4().hex[:8]}")
    try:
        for name, target in links.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            if name.name.endswith(".index.json"):  # names the shards
                content: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
                shards = {k: _without_mark(Path(v), variant).name for k, v in content["weight_map"].items()}
                (fresh / name).write_text(json.dumps({**content, "weight_map": shards}), encoding="utf-8")
            else:
                (fresh / name).symlink_to(target)
        fresh.rename(view)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not view.is_dir():  # else another process was faster
            raise UserError(
                f"The folder {view} of links to the variant {variant!r} can't be made: {error}. "
                "Set ONE_STEP_CACHE to a folder that can be written."
            ) from error


def _is_weight(name: Path) -> bool:
    return bool(re.search(r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?$", name.name))


def _without_mark(name: Path, variant: str) -> Path:
    """`model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, `….index.fp16.json` without fp16."""
    if not _is_weight(name):
        return name
    return name.with_name(re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", name.name))
