"""Influence of training samples on probe gradients, exact and sketched."""
