"""Bytes that the kernels move, against the least possible and the roofline of real chips."""
