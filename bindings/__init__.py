"""torch.library operators over the kernels: schema, fake, autograd and dispatch by device."""

from fastproj.bindings import balance_loss as balance_loss
from fastproj.bindings import combine as combine
from fastproj.bindings import cross_entropy as cross_entropy
from fastproj.bindings import edge as edge
from fastproj.bindings import gram as gram
from fastproj.bindings import per_sample_grad as per_sample_grad
from fastproj.bindings import per_sample_influence as per_sample_influence
from fastproj.bindings import project_out as project_out
from fastproj.bindings import projected_adamw as projected_adamw
from fastproj.bindings import sketch as sketch
from fastproj.bindings import weighted_grad as weighted_grad
from fastproj.bindings._library import OPERATORS, Backend, backend_for

__all__ = ["OPERATORS", "Backend", "backend_for"]
