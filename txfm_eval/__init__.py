"""Metrics and baselines: arrays in, numbers out. No torch, no store."""
