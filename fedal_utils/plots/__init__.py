"""How it looks: every figure of the suite. Each function returns (figure, caption), the sentence for under it.

style: colours, markers and lines of methods, axis labels. curves: learning curves, traffic, chains, ours beside a
paper's, paired differences. effects: differences with intervals, ends of arms. images: photographs, boxes, clients.
"""

from .curves import (
    beside_paper,
    chain_progress,
    learning_curve,
    learning_curves,
    paired_differences,
    traffic,
)
from .effects import ablation, effects
from .images import client_histograms, image_grid, score_strip, two_views
from .style import Look, style, style_of, y_label
