"""How good: average precision and accuracy, statistics over seeds, and effects between arms and strategies."""

from .ap import accuracy, evaluate
from .effects import EFFECT, arm_gains, curves_by_arm, effect, finals, findings, gains_at_equal, gaps
from .statistics import area_under_curve, cycle_ends, holm, paired_test, power, seed_interval, summary
