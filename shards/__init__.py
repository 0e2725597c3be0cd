"""Shard sets: a catalogue packed into WebDataset tars, read back by position.

Stands alone: imports nothing of dist_train and knows no process group.
"""
