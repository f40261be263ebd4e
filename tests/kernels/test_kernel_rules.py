"""Rules for kernel files, read from their syntax trees and proved red on a deliberate violation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent.parent / "gresbox" / "kernels"


def jitted(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions that Triton compiles."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(item) for item in node.decorator_list):
            yield node


def counted(loop: ast.While) -> bool:
    """Whether ``... & (counter <= bound)`` ends the loop and its body counts."""
    steps = {node.target.id for node in loop.body if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)}
    test = loop.test
    if not (isinstance(test, ast.BinOp) and isinstance(test.op, ast.BitAnd) and isinstance(test.right, ast.Compare)):
        return False
    limit = test.right
    return isinstance(limit.left, ast.Name) and limit.left.id in steps and isinstance(limit.ops[0], ast.Lt | ast.LtE)


def violations(tree: ast.Module, *, dot_allowed: bool = False, atomics_allowed: bool = False) -> list[str]:
    """Bare products, unmasked memory, unbounded loops, and sums whose order is not fixed."""
    found = []
    for function in jitted(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.While) and not counted(node):
                found.append(f"line {node.lineno}: a while loop has no bound; let its condition compare a counter")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.startswith("tl.dot") and not dot_allowed:
                found.append(f"line {node.lineno}: {called} is wrong in the interpreter; call _dot.dot")
            if called in ("tl.load", "tl.store") and not any(word.arg in ("mask", "boundary_check") for word in node.keywords):
                found.append(f"line {node.lineno}: {called} without a mask")
            if called.startswith("tl.atomic") and not atomics_allowed:
                found.append(f"line {node.lineno}: {called} sums in any order; store partial sums")
    return found


FILES = sorted(KERNELS.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_keep_the_rules(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not violations(tree, dot_allowed=path.stem == "_dot", atomics_allowed=path.stem == "deformable")


@pytest.mark.parametrize(
    "line",
    ["x = tl.dot(a, b)", "x = tl.load(p)", "tl.store(p, x)", "tl.atomic_add(p, x, mask=m)", "while x < 3:\n        x += 1"],
)
def test_a_violation_is_red(line):
    assert violations(ast.parse(f"@triton.jit\ndef kernel(p):\n    {line}"))
    assert not violations(ast.parse(f"def launch(p):\n    {line}"))


def test_what_is_allowed_is_green():
    assert not violations(ast.parse("@triton.jit\ndef kernel(n):\n    while (n > 0) & (x <= 3):\n        x += 1"))
    assert not violations(ast.parse("@triton.jit\ndef kernel(p, m):\n    tl.store(p, dot(tl.load(p, mask=m), 1), mask=m)"))
