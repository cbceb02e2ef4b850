"""Latent factors: read from the weights of a fine-tune, tested, saved."""
