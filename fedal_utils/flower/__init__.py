"""Clients elsewhere: the same experiment under Flower."""
