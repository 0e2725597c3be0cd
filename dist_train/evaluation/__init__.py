"""Metrics, the F1 curve, floors and leaks: pure functions of arrays and tables."""
