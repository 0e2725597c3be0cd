"""Run encoders over a shard set: exactly one row an item."""
