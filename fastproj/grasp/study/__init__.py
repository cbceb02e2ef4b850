"""The study: whether a factor found in a naive fine-tune is the planted one, and what holding it does."""
