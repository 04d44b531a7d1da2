"""Published numbers, and what a measurement must share with them to stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.evaluation_sets import EvaluationSet


@dataclass(frozen=True)
class Published:
    """Values of one model in one publication."""

    model: str
    source: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """How a publication measures.

    Attributes:
        details: for each metric, what its details must say to be the same measurement; the network by
            a part of its name.
        results: published values. ``notes``: for each metric, what the publication leaves open.
    """

    details: Mapping[str, Mapping[str, Any]]
    results: tuple[Published, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


def _scores(names: str, *values: float) -> dict[str, float]:
    return dict(zip(names.split(), values, strict=True))


_FC, _FCPR = "fid clip_score", "fid clip_score precision recall"
_STYLES = "hpsv2/anime hpsv2/photo hpsv2/concept-art hpsv2/paintings"
_LSG, _SB2 = "SiD-LSG, arXiv 2406.01561", "SwiftBrush v2, arXiv 2408.14176"
_DMD2, _MJHQ = "DMD2, arXiv 2405.14867", "card of playgroundai's MJHQ-30K"
_SNOOPI1, _SNOOPI3 = "SNOOPI, arXiv 2412.02687v1", "SNOOPI, arXiv 2412.02687v3"
_PHOTO = {"network": "ViT-g-14", "prefix": "A photo depicts ", "scale": 1.0}
_TENSORFLOW = {"network": "guided-diffusion's TensorFlow Inception (BGR)", "k": 3}  # no metric here has it

PROTOCOLS: dict[str, Protocol] = {
    "coco30k_dmd2": Protocol(
        details={
            "fid": {"mode": "clean"},
            "clip_score": _PHOTO,
        },
        results=(
            Published("DMD2, SD1.5, one step, without GAN", _DMD2, _scores("fid", 9.28)),
            Published("DMD2, SD1.5, one step", _DMD2, _scores("fid", 8.35)),
            Published("SiD-LSG, SD1.5, κ 1.5", _LSG, _scores(_FC, 8.71, 0.302)),
            Published("SiD-LSG, SD1.5, κ 1.5, trained longer", _LSG, _scores(_FC, 8.15, 0.304)),
            Published("SiD-LSG, SD1.5, κ 2", _LSG, _scores(_FC, 9.56, 0.313)),
            Published("SiD-LSG, SD1.5, κ 3", _LSG, _scores(_FC, 13.21, 0.314)),
            Published("SiD-LSG, SD1.5, κ 4.5", _LSG, _scores(_FC, 16.59, 0.317)),
            Published("SiD-LSG, SD2.1-base, κ 1.5", _LSG, _scores(_FC, 9.52, 0.308)),
            Published("SiD-LSG, SD2.1-base, κ 2", _LSG, _scores(_FC, 10.97, 0.318)),
            Published("SiD-LSG, SD2.1-base, κ 3", _LSG, _scores(_FC, 13.50, 0.321)),
            Published("SiD-LSG, SD2.1-base, κ 4.5", _LSG, _scores(_FC, 16.54, 0.322)),
        ),
    ),
    "coco30k_swiftbrush": Protocol(
        details={
            "fid": {"mode": "clean"},
            "clip_score": _PHOTO,
            "precision": _TENSORFLOW,
            "recall": _TENSORFLOW,
        },
        results=(
            Published("SwiftBrush, measured again", _SB2, _scores(_FCPR, 15.46, 0.30, 0.47, 0.46)),
            Published("SwiftBrush v2, model A", _SB2, _scores(_FCPR, 11.27, 0.31, 0.48, 0.54)),
            Published("SwiftBrush v2, model B", _SB2, _scores(_FCPR, 11.02, 0.32, 0.51, 0.52)),
            Published("SwiftBrush v2, merged", _SB2, _scores(_FCPR, 8.77, 0.32, 0.55, 0.53)),
            Published("SwiftBrush v2, with real images", _SB2, _scores(_FCPR, 8.14, 0.32, 0.57, 0.52)),
            Published("SD Turbo, one step", _SB2, _scores(_FCPR, 16.10, 0.33, 0.65, 0.35)),
            Published("SD2.1, guidance 2", _SB2, _scores("fid", 9.64)),
            Published("SD2.1, guidance 4.5", _SB2, _scores("fid", 12.26)),
        ),
        notes=dict.fromkeys(
            _FCPR.split(), "the paper leaves the protocol open; this is that of the code it released"
        ),
    ),
    "mjhq30k": Protocol(
        details={"fid": {"mode": "clean"}},
        results=(
            Published("SDXL 1.0 with refiner", _MJHQ, _scores("fid", 9.55)),
            Published("Playground v2, 1024 px", _MJHQ, _scores("fid", 7.07)),
        ),
        notes={"fid": "the card says FID at 1024x1024 and not by which code; clean-fid is assumed"},
    ),
    "hpsv2": Protocol(
        details={"hpsv2": {"hps_version": "v2.0", "scale": 100}},
        results=(
            Published("SwiftBrush", _SB2, _scores(_STYLES, 26.91, 27.21, 26.32, 26.37)),
            Published("SwiftBrush v2", _SB2, _scores(_STYLES, 27.13, 27.56, 26.69, 26.76)),
            Published("SwiftBrush v2, with real images", _SB2, _scores(_STYLES, 27.25, 27.62, 26.86, 26.77)),
            Published("SwiftBrush v2, with an HPS loss", _SB2, _scores(_STYLES, 28.22, 28.00, 27.35, 27.42)),
            Published("PG-SB, SD1.5", _SNOOPI1, _scores("hpsv2", 27.02)),
            Published("PG-SB, SD2.1", _SNOOPI1, _scores("hpsv2", 27.35)),
            Published("PG-SB, PixArt-α", _SNOOPI1, _scores("hpsv2", 30.34)),
            Published("PG-SB, SD1.5, with NASA", _SNOOPI1, _scores("hpsv2", 27.03)),
            Published("PG-SB, SD2.1, with NASA", _SNOOPI1, _scores("hpsv2", 27.53)),
            Published("PG-SB, PixArt-α, with NASA", _SNOOPI1, _scores("hpsv2", 31.08)),
            Published("NASA-T, SD1.5", _SNOOPI3, _scores("hpsv2", 27.45)),
            Published("NASA-T, SD2.1", _SNOOPI3, _scores("hpsv2", 27.84)),
            Published("NASA-T, PixArt-α", _SNOOPI3, _scores("hpsv2", 30.61)),
        ),
        notes={
            "hpsv2": "the papers do not say which version of HPSv2 they use; v2.0 is assumed, as SwiftBrush "
            "v2 quotes its table (but its code has the default of hpsv2 1.2.0, v2.1)"
        },
    ),
}  # fmt: skip


_LABELS = {"fid": "FID", "geneval": "GenEval (HF detector)"}


def label(name: str, evaluation_set: EvaluationSet) -> str:
    """Name of a metric in tables; with its sample count where that is not the published one.

    FID has it wherever one is published (FID-5k, FID-30k).
    """
    plain, count = _LABELS.get(name, name), len(evaluation_set)
    is_whole = not _is_few_samples(evaluation_set)
    if is_whole and (name != "fid" or evaluation_set.published_count is None):
        return plain
    return f"{plain}-{count / 1000:g}k" if count >= 1000 else f"{plain}-{count}"


def _is_few_samples(evaluation_set: EvaluationSet) -> bool:
    return evaluation_set.published_count not in (None, len(evaluation_set))


def deviations(name: str, result: Mapping[str, Any], evaluation_set: EvaluationSet) -> list[str] | None:
    """In what a measurement differs from the published protocol of its set; None: there is none."""
    protocol = PROTOCOLS.get(evaluation_set.name)
    metric = name.partition("/")[0]
    if protocol is None or metric not in protocol.details:
        return None
    found, details = [], result["details"]
    if "differs" in evaluation_set.facts:
        found.append(evaluation_set.facts["differs"])
    if _is_few_samples(evaluation_set):
        found.append(f"{len(evaluation_set):,} pictures instead of {evaluation_set.published_count:,}")
    references = details.get("reference_num_images")
    wanted = evaluation_set.published_references
    if references is not None and wanted is not None and references != wanted:
        found.append(f"{references:,} real pictures instead of {wanted:,}")
    for key, value in protocol.details[metric].items():
        measured = details.get("extractor" if key == "network" else key)
        if (value not in str(measured)) if key == "network" else (measured != value):
            found.append(f"{key.replace('_', ' ')} {measured} instead of {value}")
    return found


def remarks(name: str, evaluation_set: EvaluationSet) -> list[str]:
    """What the publication leaves open, and known small differences of the set, each called so."""
    protocol = PROTOCOLS.get(evaluation_set.name)
    note = protocol.notes.get(name.partition("/")[0]) if protocol is not None else None
    found = [f"open: {note}"] if note else []
    return found + [f"small difference: {text}" for text in evaluation_set.notes]


def published_rows(
    results: Mapping[str, Mapping[str, Any]], evaluation_set: EvaluationSet
) -> list[tuple[str, Published]]:
    """(metric, publication) for every metric measured as published, but for `remarks`."""
    protocol = PROTOCOLS.get(evaluation_set.name)
    if protocol is None:
        return []
    same = [name for name, result in results.items() if deviations(name, result, evaluation_set) == []]
    return [(name, row) for name in same for row in protocol.results if name in row.values]
