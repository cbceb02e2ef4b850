"""Debiasing methods: thin classes over the projections and the capture."""
