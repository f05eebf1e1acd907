"""How it looks: every figure of the suite. Each function returns (figure, caption), the sentence for under it."""

from .curves import ablation, beside_paper, chain_progress, effects, learning_curves, paired_differences, traffic
from .images import client_histograms, image_grid, score_strip, two_views
from .style import style, style_of, y_label
