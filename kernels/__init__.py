"""Triton device code and its plain launchers. Imports torch and triton only, and only when asked for."""
