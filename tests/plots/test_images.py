"""Images with boxes: what stands where; the highest scores above; counts in their cells."""

import torch
from matplotlib.colors import to_hex

from fedal_utils import plots
from fedal_utils.data import Detections, Images, Labels
from fedal_utils.plots.style import PALETTE

NAMES = ("cat", "dog", "emu")


def images(count=4):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 20, 30).contiguous()
    return Images(tuple(f"i{n}" for n in range(count)), pixels, torch.tensor([[20, 30]] * count))


def detections(count=4):
    boxes = torch.tensor([[[2.0, 3.0, 12.0, 13.0], [10.0, 5.0, 25.0, 15.0]]]).repeat(count, 1, 1)
    labels = torch.tensor([[1, 3]]).repeat(count, 1)
    return Detections(boxes, torch.tensor([[0.9, 0.2]]).repeat(count, 1), labels, torch.zeros(count, 2, 4))


def boxes_of(ax):
    return [(*p.get_xy(), p.get_width(), p.get_height(), to_hex(p.get_edgecolor()).upper()) for p in ax.patches]


def shown(figure):
    return [ax for ax in figure.axes if ax.images]


def test_boxes_stand_at_their_pixels_in_the_colour_of_their_class():
    boxes = torch.tensor([[[2.0, 3, 12, 13], [5, 5, 6, 6]]])
    labels = Labels(boxes, torch.tensor([[2, 1]]), torch.tensor([[False, True]]), torch.zeros(1, 2).bool())
    (ax,) = plots.image_grid(images(1), labels, NAMES, [0])[0].axes
    assert boxes_of(ax) == [(2, 3, 10, 10, PALETTE[1]), (5, 5, 1, 1, PALETTE[0])]
    assert [p.get_linestyle() for p in ax.patches] == ["-", "--"] and not ax.texts
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 30), (20, 0))


def test_a_grid_shows_labels_or_good_detections_and_a_legend_of_the_classes_there():
    figure, caption = plots.image_grid(images(), detections(), NAMES, [0, 2, 3], titles=["a", "b", "c"])
    assert len(shown(figure)) == 3 and all(len(ax.patches) == 1 for ax in shown(figure))
    assert [t.get_text() for t in shown(figure)[0].texts] == ["0.90"] and "confidence above 0.3" in caption
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["cat"]
    found = detections()
    labels = Labels(found.boxes, found.labels, torch.tensor([[False, True]] * 4), torch.zeros(4, 2).bool())
    figure, caption = plots.image_grid(images(), labels, NAMES, range(4))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["cat", "emu"] and "ignored" in caption
    figure, caption = plots.image_grid(images(), None, NAMES, range(2))
    assert caption == "" and not figure.legends and not any(ax.patches for ax in figure.axes)


def test_two_views_draw_the_mirrored_box_where_it_lies_in_the_mirror_image():
    figure, _ = plots.two_views(images(), detections(), detections(), NAMES, [1, 3], ["one", "two"])
    axes = shown(figure)
    assert [ax.get_title() for ax in axes] == ["one", "mirrored", "two", "mirrored"]
    assert [boxes_of(ax)[0][:4] for ax in axes[:2]] == [(2, 3, 10, 10), (18, 3, 10, 10)]
    assert [int(ax.images[0].get_array()[0, 0, 0]) for ax in axes] == [1, 1, 3, 3]


def test_the_highest_scores_stand_above_and_the_lowest_below():
    figure, _ = plots.score_strip(images(6), [0.1, 0.9, 0.5, 0.9, 0.2, 0.0], show=2)
    titles = [ax.get_title() for ax in shown(figure)]
    assert titles == ["queried first: 0.9", "queried first: 0.9", "queried last: 0.1", "queried last: 0"]
    assert [int(ax.images[0].get_array()[0, 0, 0]) for ax in shown(figure)] == [1, 3, 0, 5]


def test_every_count_is_written():
    (ax,) = plots.client_histograms([[1, 20, 3], [0, 5, 6]], NAMES, ["00", "day 2"], what="images")[0].axes
    assert [t.get_text() for t in ax.texts] == ["1", "20", "3", "0", "5", "6"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["client 00", "day 2"]
