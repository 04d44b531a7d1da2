"""GenEval's decisions on synthetic detections, its detector and colours on miniatures, and its twin."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models._meta import _COCO_CATEGORIES
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, Mask2FormerImageProcessor

from callbacks.metrics.detection import COLOURS, TEMPLATES, DetectorExtractor, Instance, instances
from callbacks.metrics.emoji_geneval import EmojiTaskAccuracy
from callbacks.metrics.geneval import GenEvalAccuracy, relations, shows
from common.errors import UserError
from datamodules.pictures import BACKGROUNDS, STYLES
from datamodules.task_prompts import (
    EMOJI_FILE,
    EMOJI_TASKS,
    GENEVAL_TASKS,
    EmojiGenEval,
    GenEval,
    emoji_prompt,
    read_entries,
)  # fmt: skip
from lightning_modules.networks.model_names import asset_path
from tests.callbacks.judge_files import detector_folder
from tests.callbacks.networks import pictures, pil


def instance(*box: float, score: float = 0.5) -> Instance:
    return Instance(box, score, torch.ones(1, 1, dtype=torch.bool))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 20, 10, 30), {"above"}),
        ((0, 20, 10, 30), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # centres apart by 2 = 0.1 · (10 + 10): not enough
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),  # 2.1 of 4.1 is left, more than half
        ((0, 0, 10, 10), (3.9, 0, 13.9, 10), set()),  # 1.9 of 3.9, less than half
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (20, 12, 30, 22), {"left of"}),  # 10/23.3 below a half: not above
    ],
)
def test_where_one_box_lies_from_another(first: Any, second: Any, found: set[str]) -> None:
    assert relations(first, second) == found


def test_relations_are_those_of_the_paper_on_random_boxes() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        corners = random.uniform(0, 100, (2, 2, 2))
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)  # [2, 4]
        offset = (boxes[0, :2] + boxes[0, 2:] - boxes[1, :2] - boxes[1, 2:]) / 2
        size = (boxes[:, 2:] - boxes[:, :2]).sum(0)
        moved = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * size, 0, None) / np.linalg.norm(offset)
        expected = {name for name, axis, sign in [("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1),
                                                  ("below", 1, 1)] if sign * moved[axis] > 0.5}  # fmt: skip
        assert relations(tuple(boxes[0]), tuple(boxes[1])) == expected


def test_counts_colours_places_and_what_must_not_be_there() -> None:
    dog, far_dog, cat = instance(0, 0, 10, 10), instance(50, 0, 60, 10), instance(20, 0, 30, 10)
    coat = {id(dog): "red", id(far_dog): "blue", id(cat): "red"}

    def colours(name: str, some: list[Instance]) -> list[str]:
        return [coat[id(one)] for one in some]

    def judged(found: dict[str, list[Instance]], *include: dict[str, Any], **rest: Any) -> bool:
        return shows({"include": list(include), **rest}, found, colours)

    one_dog, two_dogs = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
    assert judged({"dog": [dog]}, one_dog) and not judged({"cat": [cat]}, one_dog)
    assert not judged({"dog": [dog]}, one_dog, {"class": "cat", "count": 1})
    three = [{"class": "dog", "count": 3}]
    assert judged({"dog": [dog, far_dog]}, two_dogs, exclude=three)
    assert not judged({"dog": [dog]}, two_dogs, exclude=three)
    assert not judged({"dog": [dog, far_dog, cat]}, two_dogs, exclude=three)
    assert judged({"dog": [dog, far_dog]}, one_dog | {"color": "red"})  # the most confident one counts
    assert not judged({"dog": [far_dog, dog]}, one_dog | {"color": "red"})
    assert not judged({"dog": [dog, far_dog]}, two_dogs | {"color": "red"})
    right_of = {"class": "cat", "count": 1, "position": ["right of", 0]}
    assert judged({"dog": [dog], "cat": [cat]}, one_dog, right_of)
    assert not judged({"dog": [far_dog], "cat": [cat]}, one_dog, right_of)
    assert not judged({"dog": [dog, far_dog], "cat": [cat]}, two_dogs, right_of)  # from all of the group
    assert not judged({"cat": [cat]}, one_dog, right_of)  # nothing to be right of


def test_instances_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(6, 4, generator=generator)
    masks = F.interpolate(3 * torch.randn(1, 6, 8, 8, generator=generator), (384, 384), mode="bilinear")[0]
    outputs = SimpleNamespace(class_queries_logits=logits[None], masks_queries_logits=masks[None])
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.3, return_binary_maps=True
    )[0]
    ours = instances(logits, masks, 0.3)
    expected = sorted((one["label_id"], one["score"]) for one in theirs["segments_info"])
    found = sorted((number, one.score) for number, some in ours.items() for one in some)
    assert len(found) > 2 and [number for number, _ in found] == [number for number, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    for number, some in ours.items():
        assert [one.score for one in some] == sorted((one.score for one in some), reverse=True)
        for one in some:
            place = next(
                i for i, other in enumerate(theirs["segments_info"])
                if other["label_id"] == number and abs(other["score"] - one.score) < 1e-5
            )  # fmt: skip
            assert torch.equal(one.mask, theirs["segmentation"][place].bool())
            rows, columns = np.nonzero(one.mask.numpy())
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


class Seen(DetectorExtractor):
    """A detector and a CLIP that see what the test says; pictures are not looked at."""

    def __init__(self, **found: list[Instance]) -> None:
        self.path, self.classes, self.thresholds = Path("x"), {"dog": 0, "cat": 1}, list[float]()
        self.found = {self.classes[name]: some for name, some in found.items()}

    def detect(self, picture: torch.Tensor, threshold: float) -> dict[int, list[Instance]]:
        self.thresholds.append(threshold)
        return {number: [a for a in some if a.score > threshold] for number, some in self.found.items()}

    def colours(self, picture: torch.Tensor, name: str, found: list[Instance]) -> list[str]:
        return ["red" for _ in found]


def judged_by(eyes: Seen, monkeypatch: pytest.MonkeyPatch, *wanted: dict[str, Any]) -> list[bool]:
    monkeypatch.setattr(GenEvalAccuracy, "extractor", eyes)
    return GenEvalAccuracy().judge(torch.zeros(len(wanted), 3, 4, 4), list(wanted))


def test_counting_asks_for_more_confidence_than_the_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of the benchmark's script: 0.3, and 0.9 to count."""
    eyes = Seen(dog=[instance(0, 0, 9, 9, score=0.91), instance(0, 0, 9, 9, score=0.89)],
                cat=[instance(0, 0, 9, 9, score=0.31), instance(0, 0, 9, 9, score=0.29)])  # fmt: skip
    one_dog, two_cats = {"class": "dog", "count": 1}, {"class": "cat", "count": 2}
    count = {"tag": "counting", "include": [one_dog], "exclude": [{"class": "dog", "count": 2}]}
    assert judged_by(eyes, monkeypatch, count, count | {"tag": "single_object"}) == [True, False]
    assert judged_by(eyes, monkeypatch, *(
        {"tag": tag, "include": [{"class": "cat", "count": 1}]} for tag in ("counting", "colors")
    )) == [False, True]  # fmt: skip
    assert judged_by(eyes, monkeypatch, {"tag": "colors", "include": [two_cats]}) == [False]
    eyes.thresholds.clear()
    judged_by(eyes, monkeypatch, *({"tag": tag, "include": [one_dog]} for tag in GENEVAL_TASKS))
    assert dict(zip(GENEVAL_TASKS, eyes.thresholds, strict=True)) == {
        "single_object": 0.3, "two_object": 0.3, "counting": 0.9, "colors": 0.3, "position": 0.3,
        "color_attr": 0.3,
    }  # fmt: skip


def test_sixteen_objects_of_a_class_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = Seen(dog=[instance(0, 0, 9, 9, score=0.95)] * 20)
    dogs = [{"tag": "counting", "include": [{"class": "dog", "count": n}]} for n in (3, 16, 17)]
    assert judged_by(eyes, monkeypatch, *dogs) == [True, True, False]


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A file of two prompts."""
    lines = [
        {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]},
        {"tag": "colors", "prompt": "a photo of a red tv remote",
         "include": [{"class": "computer mouse", "count": 1, "color": "red"}]},
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "prompts.jsonl"


def test_the_whole_on_a_miniature(benchmark: Path, tiny_clip: Path, tmp_path: Path) -> None:
    detector = str(detector_folder(tmp_path / "detector"))
    metric = GenEvalAccuracy(str(benchmark), detector, str(tiny_clip), shortest=64, longest=96)
    metric.bind()
    drawn = GenEval(str(benchmark)).load()
    assert (len(drawn), drawn.images_per_prompt, drawn.published_count) == (8, 4, 2212)
    metric.prepare(drawn.captions, drawn.groups)
    images = pictures(8, height=40, width=32)
    metric.update(images, drawn.captions, None, range(8))
    found = metric.results()
    assert set(found) == {"geneval", "geneval/single_object", "geneval/colors"}
    tasks = [found[f"geneval/{task}"]["value"] for task in ("single_object", "colors")]
    assert found["geneval"]["value"] == pytest.approx(sum(tasks) / 2) and found["geneval"]["num_images"] == 8
    eyes = metric.extractor
    assert isinstance(eyes, DetectorExtractor)
    seen = [eyes.detect(image, 0.3) for image in images[:4]]
    assert any(seen) and tasks[0] == sum(0 in some for some in seen) / 4
    some = next(one for found in seen for group in found.values() for one in group)
    assert some.mask.shape == (40, 32)
    with pytest.raises(UserError, match="the detector detector knows no 'zebra'"):
        eyes.number_of("zebra")


def test_what_the_detector_is_given_and_where_its_masks_lie(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet's mean and deviation and grey padding at the right and below, of which the masks know nothing.

    The masks are slopes, which interpolation keeps: above zero from a column, or a row, on.
    """
    detector = str(detector_folder(tmp_path / "detector"))
    eyes, given = DetectorExtractor(detector, str(tiny_clip), None, shortest=40, longest=96), {}
    centres = torch.arange(2, 64, 4.0)  # of the cells of a mask, a quarter of the padded 64 x 64 pixels

    def forward(**inputs: torch.Tensor) -> Any:
        given.update(inputs)
        masks = torch.stack([(centres - 20)[None].expand(16, 16), (centres - 30)[:, None].expand(16, 16)])
        logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0]])
        return SimpleNamespace(class_queries_logits=logits[None], masks_queries_logits=masks[None])

    monkeypatch.setattr(eyes.model, "forward", forward)
    picture = pictures(1, height=40, width=32)[0]
    found = eyes.detect(picture, 0.3)
    seen = F.interpolate(picture[None], (50, 40), mode="bilinear", align_corners=False)[0]
    expected = torch.zeros(1, 3, 64, 64)
    for i, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected[0, i, :50, :40] = (seen[i] - mean) / deviation
    assert torch.allclose(given["pixel_values"], expected, atol=1e-5)
    assert torch.equal(given["pixel_mask"], torch.ones(1, 64, 64, dtype=torch.long))
    (right,), (lower,) = found[0], found[1]  # from column 20 of 40 and row 30 of 50 on
    assert right.box == (16, 0, 32, 40) and lower.box == (0, 24, 32, 40)
    assert right.mask[:, 16:].all() and not right.mask[:, :16].any()
    assert lower.mask[24:].all() and not lower.mask[:24].any()


def test_the_80_classes_are_those_of_the_detector() -> None:
    """COCO's, three with longer names in the benchmark; the published detector names six as Pascal VOC."""
    coco = [name for name in _COCO_CATEGORIES[1:] if name != "N/A"]
    longer = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    voc = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
           "dining table": "diningtable", "tv": "tvmonitor"}  # fmt: skip
    for detectors in (coco, [voc.get(name, name) for name in coco]):
        eyes = SimpleNamespace(
            classes={name: number for number, name in enumerate(detectors)}, path=Path("x")
        )
        numbers = [DetectorExtractor.number_of(eyes, longer.get(name, name)) for name in coco]  # type: ignore[arg-type]
        assert numbers == list(range(80))


def test_colours_are_clips_choice_of_the_cut_out(benchmark: Path, tiny_clip: Path, tmp_path: Path) -> None:
    eyes = DetectorExtractor(str(detector_folder(tmp_path / "detector")), str(tiny_clip), None)
    picture, mask = pictures(1, height=40, width=32)[0], torch.zeros(40, 32, dtype=torch.bool)
    mask[5:25, 8:30] = True
    mask[10, 10] = False
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    pixels = np.array(pil(picture))
    pixels[~mask.numpy()] = 0x99
    with torch.no_grad():
        inputs = CLIPImageProcessor.from_pretrained(tiny_clip)(pixels[5:25, 8:30], return_tensors="pt")
        image = model.get_image_features(**inputs).pooler_output[0]
        means = []
        for colour in COLOURS:
            texts = [template.format(colour=colour, thing="dog") for template in TEMPLATES]
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            means.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(0))
        expected = COLOURS[int((F.normalize(torch.stack(means), dim=-1) @ image).argmax())]
    assert eyes.colours(picture, "dog", [Instance((8, 5, 30, 25), 0.9, mask)]) == [expected]


def test_prompts_that_are_not_the_benchmarks(benchmark: Path, tmp_path: Path) -> None:
    metric = GenEvalAccuracy(str(benchmark))
    with pytest.raises(
        UserError, match=r"'a cat' is no prompt of .*prompts.jsonl.*configs/eval/geneval.yaml"
    ):
        metric.prepare(["a photo of a dog", "a cat"])
    with pytest.raises(UserError, match=r"'a photo of a dog' is no prompt of .* in the task 'colors'"):
        metric.prepare(["a photo of a dog"], ["colors"])
    with pytest.raises(UserError, match="geneval needs the benchmark's file"):
        GenEvalAccuracy().prepare(["a"])
    broken = tmp_path / "broken.jsonl"
    line = {
        "tag": "position",
        "prompt": "x",
        "include": [{"class": "a", "count": 1, "position": ["under", 0]}],
    }
    for text, message in [
        ("a photo of a dog", "line 1: Expecting value"),
        ('{"prompt": "a dog"}', r"line 1: it has no 'tag'; a line is an object with tag, prompt and what"),
        ('{"tag": "colours", "prompt": "a dog"}', "its tag 'colours' is none of single_object, two_object"),
        ('{"tag": "colors", "prompt": "a dog"}', "it has no 'include'"),
        (
            '\n{"tag": "colors", "prompt": "a", "include": [{"class": "a", "count": 0}]}',
            "line 2: an object needs",
        ),
        (json.dumps(line), "its position .* is none of left of"),
        ("[1]", "line 1: list indices"),
        ("", "is empty"),
    ]:
        broken.write_text(text)
        with pytest.raises(UserError, match=message):
            read_entries(broken, GENEVAL_TASKS)
    with pytest.raises(UserError, match="give --captions evaluation_metadata.jsonl"):
        GenEval().load()
    with pytest.raises(UserError, match="can't be read"):
        GenEval(str(tmp_path / "nowhere.jsonl")).load()


def test_the_twin_chooses_among_texts_and_looks_at_corners(tmp_path: Path) -> None:
    entries = read_entries(EMOJI_FILE, EMOJI_TASKS)
    drawn = EmojiGenEval(images_per_prompt=1).load()
    assert len(entries) == 144 and [entry["tag"] for entry in entries].count("object_style") == 24
    chosen = [next(i for i, entry in enumerate(entries) if entry["tag"] == task) for task in EMOJI_TASKS]
    images = torch.stack(
        [torch.tensor(BACKGROUNDS[entries[i]["background"] or "red"])[:, None, None].expand(3, 64, 64) / 255
         for i in chosen]
    )  # fmt: skip
    images[:, :, 20:44, 20:44] = pictures(6, height=24, width=24)
    metric = EmojiTaskAccuracy(model="assets/emoji-clip")
    metric.bind()
    metric.prepare(drawn.captions, drawn.groups)
    metric.update(images, [drawn.captions[i] for i in chosen], None, chosen)
    found = {name.partition("/")[2]: result["value"] for name, result in metric.results().items()}
    folder = asset_path("assets/emoji-clip")
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor, objects = CLIPImageProcessor.from_pretrained(folder), sorted({e["object"] for e in entries})

    def best(image: torch.Tensor, texts: list[str]) -> int:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            both = model(**tokens, **processor([pil(image)], return_tensors="pt"))
        return int(both.logits_per_image.argmax())

    for i, image in zip(chosen, images, strict=True):
        entry = entries[i]
        thing, style, background = (entry[name] for name in ("object", "style", "background"))
        right = {
            "object": objects[best(image, [emoji_prompt(o, style, background) for o in objects])] == thing,
            "style": STYLES[best(image, [emoji_prompt(thing, s, background) for s in STYLES])] == style,
            "background": True,  # its corners are of that colour
        }
        assert found[entry["tag"]] == all(right[field] for field in entry["tag"].split("_"))
    assert found["background"] == 1 and found[""] == pytest.approx(sum(found[t] for t in EMOJI_TASKS) / 6)


def test_a_picture_is_right_where_all_is_and_the_value_is_the_mean_over_the_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One field is wrong: so is each task that names it. Shares of 2 of 3 and 0 of 1 are a third."""
    metric, entries = EmojiTaskAccuracy(model="nowhere"), read_entries(EMOJI_FILE, EMOJI_TASKS)
    wanted = [next(entry for entry in entries if entry["tag"] == task) for task in EMOJI_TASKS]
    for wrong in ("object", "style", "background"):

        def said(_: Any, entry: dict[str, Any], field: str, other: str = wrong) -> Any:
            return None if field == other else entry[field]

        monkeypatch.setattr(metric, "_chosen", said)
        metric._backgrounds = ["" if wrong == "background" else entry["background"] for entry in wanted]
        found = metric.judge(torch.ones(6, 2), wanted)
        assert found == [wrong not in task.split("_") for task in EMOJI_TASKS]
    metric.setup_states(2)
    metric._wanted = [wanted[0], wanted[0], wanted[0], wanted[1]]
    monkeypatch.setattr(metric, "judge", lambda *_: [True, True, False, False])
    metric._add(torch.ones(4, 2), ["x"] * 4, [0, 1, 2, 3])
    assert float(metric._value()) == pytest.approx((2 / 3 + 0) / 2)
