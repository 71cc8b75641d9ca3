"""Triton kernels, one file per operator; installed as `vpd_fast.kernels` and imported only when one runs."""
