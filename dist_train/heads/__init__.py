"""Margin losses over product classes, the classes sharded across ranks."""
