"""How good: average precision, accuracy, statistics over seeds.

ap: three kinds of AP from one detection list, and accuracy of classifiers.
statistics: learning curves, intervals over seeds, paired tests, the summary of a table.
effects: differences in points between arms and strategies, paired by seed, and what they show in sentences.
"""

from .ap import accuracy, evaluate
from .effects import EFFECT, arm_gains, curves_by_arm, effect, finals, findings, gains_at_equal, gaps
from .statistics import area_under_curve, cycle_ends, holm, paired_test, seed_interval, summary
