"""Metrics, the F1 curve, baselines and which items are scored: functions of arrays and tables."""
