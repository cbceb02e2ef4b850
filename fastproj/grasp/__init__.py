"""GRASP from files: a naive fine-tune, the same one under the constraint, and what else could be done."""
