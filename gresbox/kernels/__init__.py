"""Triton kernels, one file per op of the same name; only gresbox.ops imports them, and only inside functions.

A kernel file has the kernels, one function per kernel that prepares its :class:`gresbox.kernels._launch.Launch` from tensors and an
architecture, one function per registered form that allocates the outputs and runs the launches, and ``compilations(arch)``: by name
the launches that are compiled ahead of time, prepared from tensors on the meta device. The first launch of each kernel is its
default; the test suite compiles the defaults, and all of them where slow tests run.
"""

from __future__ import annotations

__all__: list[str] = []
