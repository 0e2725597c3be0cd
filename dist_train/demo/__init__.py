"""The generated catalogue."""
