"""Pictures of an adaptation: no sample is lost, and the legend tells the truth."""

import re

import torch

from upcycle3d.perception.adapt.glc.plots import embedding_plot, score_histogram
from upcycle3d.perception.adapt.glc.unknown_rule import normalized_entropy


def test_plots_bear_no_sample_and_one_dimension():
    assert "no data" in embedding_plot(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ("0", "1"), "none")
    assert "no data" in score_histogram(torch.zeros(0), 0.5, "none", "score")
    assert embedding_plot(torch.ones(4, 1), torch.tensor([0, 1, 2, 2]), ("0", "1"), "flat").count("<circle") == 4 + 3
    assert "1 of 3 lie above" in score_histogram(torch.tensor([0.1, 0.2, 0.9]), 0.5, "three", "score")


def test_the_legend_names_the_classes_and_says_when_colors_repeat():
    features, classes = torch.eye(4), torch.tensor([0, 1, 2, 2])
    two = embedding_plot(features, classes, ("Car", "Construction vehicle"), "two")
    assert ">Car<" in two
    assert ">Construction v…<" in two
    assert "repeat" not in two
    seven = embedding_plot(features, classes, tuple("abcdefg"), "seven")
    assert ">a, g<" in seven
    assert "colors repeat every 6 classes" in seven


def test_the_histogram_shows_every_sample_the_surest_ones_too():
    scores = normalized_entropy(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]))
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([^"]+)"', score_histogram(scores, 0.5, "four", "entropy"))]
    assert scores[0] == 0  # the constant inside the logarithm would make it negative and leave it out of the picture
    assert [h for h in heights if h > 0] == [heights[0], heights[-1]]
    assert heights[0] == heights[-1]
