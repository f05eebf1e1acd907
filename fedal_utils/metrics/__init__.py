"""How good: average precision, accuracy, statistics over seeds."""
