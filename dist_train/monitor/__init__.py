"""What a run records while it trains: metrics.jsonl, TensorBoard, speed and memory."""
