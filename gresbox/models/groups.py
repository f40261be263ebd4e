"""Optimiser groups: which parameters get a smaller rate, which no weight decay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["parameter_groups"]

NO_DECAY_MODULES = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.RMSNorm,
    nn.Embedding,
    nn.PReLU,
)
NO_DECAY_NAMES = ("slope", "position", "pos_embed", "level_embed", "query_features", "token", "gamma", "bias_table")
"""Parts of the names of bare parameters, those outside linear and convolution layers, that stand for tables, scales and slopes."""


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float, backbone_lr_scale: float, backbones: Sequence[nn.Module]
) -> list[dict]:
    """Split a model's trainable parameters into at most four groups.

    Follows Mask2Former's optimiser: no decay on norm layers, embeddings and position tables (and on the PReLU slope, which decay
    would pull to ReLU), a smaller rate for what starts from pretrained weights.

    Args:
        model: The model.
        lr: Learning rate outside the backbones.
        weight_decay: Decay of everything that is decayed.
        backbone_lr_scale: Factor on ``lr`` inside the backbones.
        backbones: Modules of ``model`` that start from pretrained weights.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``; empty groups are left out.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> groups = parameter_groups(model, 1.0, weight_decay=0.1, backbone_lr_scale=0.1, backbones=[model[0]])
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('main_no_decay', 1.0, 0.0), ('backbone', 0.1, 0.1)]
    """
    slow = {id(parameter) for module in backbones for parameter in module.parameters()}
    exempt = {id(parameter) for module in model.modules() for parameter in _without_decay(module)}
    groups: dict[str, dict] = {
        name + suffix: {"params": [], "lr": lr * scale, "weight_decay": decay, "name": name + suffix}
        for name, scale in (("main", 1.0), ("backbone", backbone_lr_scale))
        for suffix, decay in (("", weight_decay), ("_no_decay", 0.0))
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = ("backbone" if id(parameter) in slow else "main") + ("_no_decay" if id(parameter) in exempt else "")
            groups[key]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _without_decay(module: nn.Module) -> list[nn.Parameter]:
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, NO_DECAY_MODULES) or type(module).__name__.startswith("LayerNorm"):
        return list(own.values())
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return []
    return [parameter for name, parameter in own.items() if any(part in name for part in NO_DECAY_NAMES)]
