"""What each stage will take, computed before anything runs."""
