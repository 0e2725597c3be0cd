"""What a run tells while it runs: progress, metrics.jsonl, TensorBoard."""
