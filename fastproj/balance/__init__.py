"""Fine-tunes that treat labels alike: a balance loss, one layer found and trained, what it changes."""
