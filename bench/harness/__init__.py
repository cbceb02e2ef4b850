"""Timing on a GPU: events, cold caches, graphs, telemetry, records and their comparison."""
