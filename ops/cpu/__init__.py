"""Compiled CPU kernels, one file per operator, without torch and without checks; the operators in `ops/` prepare their arrays.

All kernels are compiled by numba on first use and cached on disk. They release the GIL, so that `ops/threads.py` can run them
side by side. numba's cache notices a change of the kernel's own file only, so a kernel never calls one of another file.
"""
