"""Checks of this machine: what it has, what is wrong with it, and how to fix that."""
