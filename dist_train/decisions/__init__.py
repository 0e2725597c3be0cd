"""Scored pairs to matches: threshold, match lists, groups, scores on the test products."""
