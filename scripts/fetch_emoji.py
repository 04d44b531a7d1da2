"""Fetch the emoji artwork that the bundled models were trained on.

    python scripts/fetch_emoji.py            # writes data/emoji/, about 6 MB

The pictures come from two npm packages (``npm`` must be on the PATH) and are not part of this repository:

* ``emoji-datasource-google``  - Noto Emoji, Apache License 2.0
* ``emoji-datasource-twitter`` - Twemoji, CC-BY 4.0

Writes ``<output>/{noto,twemoji}/<object name>.png`` (64x64 RGBA) and ``<output>/objects.json``: the object
names, lower case, sorted, with the category of each.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "16.0.0"
STYLES = {"noto": "google", "twemoji": "twitter"}
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink")
# Names that would not tell a reader what the picture shows.
PLAIN_NAMES = {
    "hocho": "kitchen knife",
    "cooking": "fried egg",
    "steaming bowl": "noodle bowl",
    "feet": "paw prints",
}


def fetch(output: Path) -> list[dict[str, str]]:
    """Download both packages and write the pictures that both styles have. Returns the index of objects."""
    with tempfile.TemporaryDirectory() as temporary:
        archives = {
            style: _download(f"emoji-datasource-{name}@{VERSION}", Path(temporary))
            for style, name in STYLES.items()
        }
        index = json.loads(_read(archives["noto"], "package/emoji.json"))
        objects = []
        for entry in index:
            if entry["category"] in CATEGORIES and all(entry[f"has_img_{name}"] for name in STYLES.values()):
                name = PLAIN_NAMES.get(entry["name"].lower(), entry["name"].lower())
                objects.append({"name": name, "category": entry["category"], "image": entry["image"]})
        objects.sort(key=lambda item: item["name"])
        for style, archive in archives.items():
            folder = output / style
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive) as tar:
                for item in objects:
                    member = tar.extractfile(f"package/img/{STYLES[style]}/64/{item['image']}")
                    assert member is not None
                    (folder / f"{item['name']}.png").write_bytes(member.read())
    (output / "objects.json").write_text(json.dumps(objects, indent=1) + "\n")
    return objects


def _download(package: str, folder: Path) -> Path:
    result = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"error: npm could not fetch {package}:\n{result.stderr.strip()}")
    return folder / result.stdout.strip().splitlines()[-1]


def _read(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(member)
        assert stream is not None
        return stream.read()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/emoji"), help="folder to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    objects = fetch(arguments.output)
    print(f"{len(objects)} objects in {len(STYLES)} styles -> {arguments.output}")


if __name__ == "__main__":
    main()
