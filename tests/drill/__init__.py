"""Damaged files of every kind, made from seeds."""
