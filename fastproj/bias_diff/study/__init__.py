"""The study: who finds biased training samples, and what removing or unlearning them does to the model."""
