"""Scored pairs to matches: fusion, threshold, groups, scores on the test products."""
