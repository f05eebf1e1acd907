"""fedal: federated active learning for object detection; the words that the numbered notebooks are written in."""

__version__ = "0.1.0"
