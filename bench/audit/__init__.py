"""Ahead-of-time compilation of every kernel, and what the machine code must keep to."""
