"""The counted cost of negative prompts on a UNet of Stable Diffusion 2.1's shape."""

from __future__ import annotations

from benchmarks.generate import operations


def test_nasa_adds_one_attention_in_each_cross_attention_layer_and_no_more() -> None:
    plain, first, later = operations("sd21")
    layers = [(4096, 320)] * 5 + [(1024, 640)] * 5 + [(256, 1280)] * 5 + [(64, 1280)]
    length, width = 77, 1024
    # two products, queries with keys and weights with values, each of S L D multiplications and additions
    assert later - plain == sum(4 * size * length * channels for size, channels in layers)
    # keys and values of the negative text, in the first call only
    assert first - later == sum(4 * length * width * channels for _, channels in layers)
    assert first <= 1.03 * plain
