"""``gresbox models`` and ``gresbox env``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from gresbox.cli.arguments import add_command

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the parsers.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    parser = add_command(commands, "models", _models, "List the presets, or count one's parameters per part.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset")
    add_command(commands, "env", _env, "Print versions and devices, for a bug report.")


def _models(args: argparse.Namespace) -> None:
    from gresbox.models import create_model, list_models

    if args.name is None:
        print("\n".join(list_models()))
        return
    model = create_model(args.name)
    rows = [(name, _count(part)) for name, part in model.named_children()]
    loose = _count(model) - sum(count for _, count in rows)
    rows += [("(of its own)", loose)] if loose else []
    for name, count in [*rows, ("total", _count(model))]:
        print(f"{name:<20} {count:>12,} parameters")


def _env(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from gresbox import __version__
    from gresbox.ops._backend import ADAPTER_DEVICES, why_not_adapter, why_not_triton

    print(f"gresbox {__version__}, Python {platform.python_version()}, {platform.platform()}")
    names = "torch torchvision numpy scipy timm transformers tokenizers torchmetrics safetensors huggingface_hub accelerate"
    for name in (*names.split(), "pycocotools", "matplotlib", "tensorboard", "triton"):
        try:
            print(f"{name:<16} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<16} not installed")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    devices = range(torch.cuda.device_count())
    for index in devices:
        print(f"GPU {index}: {torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}")
    reason = why_not_triton(*(torch.empty(0, device=index) for index in devices[:1]))
    print("Triton: " + ("usable" if reason is None else f"not used, {reason}"))
    for name, where in ADAPTER_DEVICES.items():
        missing = why_not_adapter(name)
        print(f"backend={name!r}: " + (f"usable {where}" if missing is None else missing))


def _count(module: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
