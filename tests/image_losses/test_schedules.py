"""Weights of image losses as functions of the step."""

import pytest

from common.errors import UserError
from lightning_modules.image_losses.schedules import (
    ConstantWeight,
    CosineWeight,
    LinearWeight,
    PiecewiseWeight,
    as_schedule,
)


def test_values() -> None:
    line = as_schedule(None)  # the paper's 0.1 to 0 over the training
    assert [line(step, 10) for step in (0, 5, 10, 12)] == pytest.approx([0.1, 0.05, 0, 0])
    up = LinearWeight(0.0, 2.0, steps=4)
    assert [up(step, 100) for step in (0, 1, 4, 50)] == pytest.approx([0, 0.5, 2, 2])
    cosine = CosineWeight(1.0, 0.0)
    assert [cosine(step, 12) for step in (0, 3, 4, 6, 12)] == pytest.approx([1, 0.853553, 0.75, 0.5, 0])
    bends = PiecewiseWeight([(2, 0.0), (4, 1.0), (8, 0.5)])
    expected = {0: 0, 2: 0, 3: 0.5, 4: 1, 6: 0.75, 8: 0.5, 99: 0.5}
    assert {step: bends(step, 3) for step in expected} == pytest.approx(expected)
    assert as_schedule(0.3)(7, -1) == 0.3 and as_schedule(bends) is bends


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantWeight(-1.0), "at least 0"),
        (lambda: LinearWeight(float("nan")), "finite"),
        (lambda: LinearWeight(steps=0), "at least 1"),
        (lambda: PiecewiseWeight([(3, 0.0), (3, 1.0)]), "steps rising"),
        (lambda: PiecewiseWeight([]), "steps rising"),
        (lambda: LinearWeight()(0, -1), "set trainer.max_steps"),
    ],
)
def test_what_cannot_be(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
