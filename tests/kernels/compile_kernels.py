"""Compile the launches of one kernel file, without a GPU, and print what each needs as JSON lines.

Run as ``python compile_kernels.py NAME ARCH[,ARCH...] [all]``; without ``all`` only the first launch of each kernel. Each
architecture has a process of its own: the compiler may abort the process that it fails in, and what was printed before tells which
launch it was.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(launch: Any, arch: str) -> Any:
    """The binary that ``launch.run()`` would use: signature, constants and alignment are found by Triton's own rules."""
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.fp_fusion}
    bound, specialization, _ = bind(**launch.arguments, **options)
    names = [parameter.name for parameter in kernel.params]
    signature = {name: kind for name, (kind, _) in zip(names, specialization, strict=True)}
    constants = {(i,): bound[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    hints = {(i,): hint for i, (_, hint) in enumerate(specialization) if isinstance(hint, str) and (i,) not in constants}
    source = ASTSource(kernel, signature, constants, {place: backend.parse_attr(hint) for place, hint in hints.items()})
    return triton.compile(source, target=target, options=options)


def resources(binary: Any, arch: str) -> dict[str, int]:
    """Registers per thread, bytes of shared memory, instructions that spill, matrix instructions, and threads of the launch."""
    found = {"shared": int(binary.metadata.shared), "warps": int(binary.metadata.num_warps)}
    if arch.startswith("gfx"):
        text = binary.asm["amdgcn"]

        def value(name: str) -> int:
            return int(re.search(rf"\.{name}: +(\d+)", text)[1])

        # What goes to memory; scalars that found no place are kept in lanes of a vector register.
        spills = value("vgpr_spill_count") + value("private_segment_fixed_size")
        return {**found, "registers": value("vgpr_count"), "spills": spills, "matrix": len(re.findall(r"v_mfma", text))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _tool("--dump-resource-usage", path)
        code = _tool("--dump-sass", path)
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return {**found, "registers": registers, "spills": spills, "matrix": len(re.findall(r"\b(?:HGMMA|HMMA|IMMA)\b", code))}


def _tool(option: str, path: Path) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def compile_for(name: str, arch: str, everything: bool) -> None:
    launches = importlib.import_module(f"gresbox.kernels.{name}").compilations(arch)
    seen = set()
    for label, launch in launches.items():
        if not everything and launch.kernel in seen:
            continue
        seen.add(launch.kernel)
        print(json.dumps({"start": label, "arch": arch}), flush=True)
        print(json.dumps({"launch": label, "arch": arch, **resources(compiled(launch, arch), arch)}), flush=True)


def main(name: str, architectures: list[str], everything: bool) -> int:
    """The number of architectures that failed. What is imported by now, PyTorch and Triton, is imported once for all of them."""
    importlib.import_module(f"gresbox.kernels.{name}")
    failed = 0
    for arch in architectures:
        child = os.fork()
        if child == 0:
            compile_for(name, arch, everything)
            return 0
        failed += os.waitpid(child, 0)[1] != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2].split(","), sys.argv[3:] == ["all"]))
