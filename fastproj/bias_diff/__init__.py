"""BIAS DIFF: from a bias probe to scored samples and a debiased model."""
