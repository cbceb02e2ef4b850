"""Optimisers that project the gradients they are given."""

from fastproj.optim.projected import ProjectedOptimizer as ProjectedOptimizer
from fastproj.optim.projected_adamw import ProjectedAdamW as ProjectedAdamW
