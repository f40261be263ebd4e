"""``gresbox predict``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gresbox.cli.arguments import add_checkpoint, add_command

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the parser.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    parser = add_command(commands, "predict", _predict, "Segment what a text refers to in a picture.")
    add_checkpoint(parser)
    parser.add_argument("--image", required=True, type=Path, metavar="FILE", help="the picture")
    parser.add_argument("--text", required=True, help="the expression")
    parser.add_argument("--out", type=Path, default=Path("prediction.png"), metavar="FILE", help="where the overlay goes")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="'nothing' above this probability, in [0, 1]")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def _predict(args: argparse.Namespace) -> None:
    from gresbox.models import load_model
    from gresbox.training.processes import own_device
    from gresbox.viz import draw_prediction

    image = _read_picture(args.image)
    model = load_model(args.checkpoint).to(own_device(cpu=args.cpu))
    answer = model.predict(image, args.text, no_target_threshold=args.threshold)
    draw_prediction(image, answer, path=args.out)
    if answer.no_target_prob is not None:
        verdict = "nothing" if answer.no_target_prob > args.threshold else "something"
        print(f"refers to {verdict} (no-target probability {answer.no_target_prob:.3f})")
    print(f"mask: {100 * answer.mask.float().mean().item():.1f} % of the picture")
    for place in range(len(answer.scores)):
        x0, y0, x1, y1 = (round(value) for value in answer.boxes_xyxy[place].tolist())
        words = sorted(answer.phrases[place], key=lambda item: -item[1])[:3] if answer.phrases else []
        said = "; " + ", ".join(f"{word} {weight:.2f}" for word, weight in words) if words else ""
        print(f"instance {place + 1}: score {answer.scores[place]:.2f}, box {x0} {y0} {x1} {y1} px{said}")
    print(f"wrote {args.out}")


def _read_picture(path: Path) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"gresbox predict: `--image` must be a picture file, got {path}, which does not exist.")
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"gresbox predict: `--image` must be a picture, got {path}, which cannot be read as one.") from error
