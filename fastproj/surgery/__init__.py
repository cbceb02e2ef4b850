"""Gradient surgery: methods that combine K gradients by coefficients found on their Gram matrix."""

from fastproj.surgery._method import Method
from fastproj.surgery.cagrad import CAGrad
from fastproj.surgery.dual_cone import DualProj, UPGrad
from fastproj.surgery.gem import AGEM, GEM, IGEM
from fastproj.surgery.gradvac import GradVac, GradVacTargets
from fastproj.surgery.imtl_g import IMTLG
from fastproj.surgery.mgda import MGDA
from fastproj.surgery.nash_mtl import NashMTL
from fastproj.surgery.ogd import OGD, OGDBasis
from fastproj.surgery.pcgrad import PCGrad
from fastproj.surgery.project import project
from fastproj.surgery.safegrad import SafeGrad

__all__ = [
    "AGEM",
    "GEM",
    "IGEM",
    "IMTLG",
    "MGDA",
    "OGD",
    "CAGrad",
    "DualProj",
    "GradVac",
    "GradVacTargets",
    "Method",
    "NashMTL",
    "OGDBasis",
    "PCGrad",
    "SafeGrad",
    "UPGrad",
    "project",
]
