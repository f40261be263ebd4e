"""What every model of the library shares: prediction, post-processing, parameter groups, saving and loading."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox import __version__
from gresbox._checks import check_range
from gresbox._files import write_atomically
from gresbox.models.encoders import config_from_dict
from gresbox.models.groups import parameter_groups
from gresbox.models.processor import GresProcessor, to_tensor
from gresbox.ops import align_phrases
from gresbox.structures import GresOutput, GresPrediction, InstancePrediction, Recipe, masks_to_boxes

__all__ = ["GresModel"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class GresModel(nn.Module, PyTorchModelHubMixin, library_name="gresbox", tags=["referring-expression-segmentation"]):
    """Base of the models: a frozen ``config``, a ``processor``, named parts that can be swapped, and everything around ``forward``.

    A subclass sets ``config_class`` and ``part_names``, builds its parts in ``__init__`` and calls :meth:`_finish`.
    """

    config_class: ClassVar[type]
    part_names: ClassVar[tuple[str, ...]]
    encoder_names: ClassVar[tuple[str, ...]] = ("image_encoder", "text_encoder")
    config: Any
    processor: GresProcessor

    def _finish(self) -> None:
        """Remember which parts the config built, so that saving can name those that were swapped by hand."""
        for name in self.part_names:
            if getattr(self, name) is not None:  # a part that the config leaves out
                getattr(self, name).built_from = self.config

    @property
    def recipe(self) -> Recipe:
        """The numbers this model is trained with; pictures are as large as its processor makes them."""
        return dataclasses.replace(self.config.recipe, image_size=self.processor.image_size)

    @property
    def encode_dims(self) -> tuple[int, int]:
        """Channels of :meth:`encode`'s visual features and tokens."""
        raise NotImplementedError

    def criterion(self, **options: Any) -> nn.Module:
        """The training loss that belongs to this model."""
        raise NotImplementedError

    def parameter_groups(
        self, lr: float, *, weight_decay: float | None = None, backbone_lr_scale: float | None = None
    ) -> list[dict]:
        """Optimiser groups: encoders with a smaller rate, no decay on norms, embeddings, position tables and PReLU slopes.

        Args:
            lr: Learning rate of everything but the encoders.
            weight_decay: Decay of matrices and biases; default: the recipe's.
            backbone_lr_scale: Factor on ``lr`` for the encoders; default: the recipe's.

        Returns:
            A list of dicts with ``params``, ``lr``, ``weight_decay`` and ``name``.
        """
        return parameter_groups(
            self,
            lr,
            weight_decay=self.recipe.weight_decay if weight_decay is None else weight_decay,
            backbone_lr_scale=self.recipe.backbone_lr_scale if backbone_lr_scale is None else backbone_lr_scale,
            backbones=[getattr(self, name).body for name in self.encoder_names if hasattr(getattr(self, name), "body")],
        )

    @torch.no_grad()
    def predict(self, image: Any, text: str | Sequence[str], **options: Any) -> GresPrediction | list[GresPrediction]:
        """Segment what texts refer to in pictures.

        Args:
            image: A PIL image or a uint8 tensor ``(3, H, W)``, of any size, or a list of them.
            text: An expression or a list. One picture with several texts gives one prediction per text.
            **options: Passed to :meth:`postprocess`, for example ``no_target_threshold``.

        Returns:
            One prediction, or a list where a list was given.

        Raises:
            ValueError: If the numbers of pictures and texts differ, or one is empty.
            TypeError: If a picture or text has another type.
        """
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"predict: `text` must be a string or a list of strings, got {type(text).__name__}.")
        single = isinstance(text, str) and not isinstance(image, (list, tuple))
        texts = [text] if isinstance(text, str) else list(text)
        images = list(image) if isinstance(image, (list, tuple)) else [image] * len(texts)
        if not images or not texts:
            raise ValueError(f"predict: `{'text' if not texts else 'image'}` must hold at least one item, got an empty list.")
        if len(texts) != len(images):
            raise ValueError(f"predict: `text` must be one per image with {len(images)} images, got {len(texts)}.")
        training, device = self.training, next(self.parameters()).device
        self.eval()
        predictions: list[GresPrediction] = []
        try:
            for start in range(0, len(texts), 8):
                chunk, words = [to_tensor(item) for item in images[start : start + 8]], texts[start : start + 8]
                batch = {key: value.to(device) for key, value in self.processor(chunk, words).items()}
                output = self(**batch)
                sizes = [(picture.shape[-2], picture.shape[-1]) for picture in chunk]
                predictions += self.postprocess(output, sizes, texts=words, **options)
        finally:
            self.train(training)
        return predictions[0] if single else predictions

    def postprocess(
        self,
        output: GresOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        texts: Sequence[str] | None = None,
        no_target_threshold: float = 0.5,
        score_threshold: float = 0.5,
        instances: bool = True,
    ) -> list[GresPrediction]:
        """Turn a model's output into answers at the pictures' own sizes.

        Args:
            output: What ``forward`` returned.
            sizes: Height and width of each picture.
            texts: The expressions; with them each instance gets the words it answered to.
            no_target_threshold: The answer is "nothing" above this probability; in [0, 1].
            score_threshold: Instances are kept above this relevance.
            instances: Build the instances; without them only the merged mask.

        Returns:
            One prediction per picture. Where the answer is "nothing", the mask is empty and there are no instances.
        """
        check_range("postprocess", "no_target_threshold", no_target_threshold, 0, 1)
        check_range("postprocess", "score_threshold", score_threshold, 0, 1)
        batch = output.merged.shape[0]
        if len(sizes) != batch or (texts is not None and len(texts) != batch):
            got = len(sizes) if texts is None or len(sizes) != batch else len(texts)
            raise ValueError(f"postprocess: `sizes` and `texts` must be one per image with B={batch}, got {got}.")
        probs: list[float | None] = [None] * batch
        if output.no_target is not None:
            probs = output.no_target.float().sigmoid().tolist()
        answers = []
        for index, (height, width) in enumerate(sizes):
            probability = probs[index]
            nothing = probability is not None and probability > no_target_threshold
            logits = output.merged[index : index + 1, None].float()
            mask = _resize(logits, (height, width), output.align_corners)[0, 0] > 0
            text = "" if texts is None else texts[index]
            kept: dict[str, Any] = {}
            if instances and output.instances is not None:
                threshold = float("inf") if nothing else score_threshold
                kept = self._instances(output, index, (height, width), threshold, text)
            empty = mask.new_zeros(0, height, width)
            answers.append(
                GresPrediction(
                    text=text,
                    mask=mask & (not nothing),
                    no_target_prob=probability,
                    scores=kept.get("scores", logits.new_zeros(0)),
                    instance_masks=kept.get("instance_masks", empty),
                    boxes_xyxy=kept.get("boxes_xyxy", logits.new_zeros(0, 4)),
                    phrases=kept.get("phrases"),
                    points=kept.get("points"),
                )
            )
        return answers

    def _instances(self, output: GresOutput, index: int, size: tuple[int, int], threshold: float, text: str) -> dict[str, Any]:
        """The relevant instances of one image, highest score first; those whose mask is empty are left out."""
        step: InstancePrediction = output.instances  # type: ignore[assignment]
        scores = step.score_logits[index].float().sigmoid()
        order = scores.argsort(descending=True)
        chosen = order[scores[order] > threshold]
        masks = _resize(step.masks_of(torch.full_like(chosen, index), chosen)[:, None], size, output.align_corners)[:, 0] > 0
        visible = masks.flatten(1).any(1)
        chosen, masks = chosen[visible], masks[visible]
        scale = torch.tensor([size[1], size[0], size[1], size[0]], device=masks.device)
        centre, extent = masks_to_boxes(masks).split(2, dim=-1)
        boxes = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1) * scale
        phrases = self._phrases(step, index, chosen, text) if text else None
        points = None if step.points is None else step.points[index, chosen] * scale[:2]
        return {"scores": scores[chosen], "instance_masks": masks, "boxes_xyxy": boxes, "phrases": phrases, "points": points}

    def _phrases(self, step: InstancePrediction, index: int, chosen: Tensor, text: str) -> list[list[tuple[str, float]]] | None:
        """Per instance, the relevance (eq. 1) over words: sub-word pieces are merged, special tokens left out, weights sum to 1."""
        if self.processor.tokenizer is None or step.queries.shape[-1] != step.tokens.shape[-1]:
            return None
        valid = None if step.valid is None else step.valid[index : index + 1]
        _, relevance = align_phrases(step.queries[index : index + 1, chosen], step.tokens[index : index + 1], valid)
        words = self.processor.words(text)
        phrases = []
        for row in relevance[0].tolist():
            weights = [sum(row[position] for position in positions if position < len(row)) for _, positions in words]
            total = sum(weights) or 1.0
            phrases.append([(word, weight / total) for (word, _), weight in zip(words, weights, strict=True)])
        return phrases

    def foreign_parts(self) -> dict[str, str]:
        """Parts that were swapped by hand, with their classes: the config does not know how to build them."""
        parts = {name: getattr(self, name) for name in self.part_names if getattr(self, name) is not None}
        return {name: _class_name(part) for name, part in parts.items() if getattr(part, "built_from", None) != self.config}

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        folder = Path(save_directory)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
        described = {
            "model_class": type(self).__name__,
            "gresbox_version": __version__,
            "config": dataclasses.asdict(self.config),
            "processor": self.processor.settings(),
            "foreign_parts": self.foreign_parts(),
        }
        write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(described, indent=2) + "\n"))
        self.processor.save_tokenizer(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load what ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: A folder, or a Hugging Face hub id ``owner/name``.
            **options: Parts that were swapped by hand, ``map_location``, and the hub's ``revision``, ``cache_dir``, ``token``,
                ``force_download`` and ``local_files_only``.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such folder or repository.
            ValueError: If a file cannot be read, does not fit, or a swapped part is missing.
        """
        model_id = str(pretrained_model_name_or_path)
        # The base class would ask the hub for any name.
        find_file(model_id, CONFIG_FILE, **{key: options[key] for key in HUB_OPTIONS if key in options})
        return super().from_pretrained(model_id, **options)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: Any = None, map_location: str = "cpu", strict: bool = True, **options: Any
    ) -> Any:
        hub: dict[str, Any] = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        for key in ("proxies", "resume_download"):
            options.pop(key, None)
        unknown = sorted(set(options) - set(cls.part_names))
        if unknown:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: `{unknown[0]}` must be one of {', '.join(cls.part_names)}, got another name."
            )
        described = read_config(model_id, **hub)
        missing = sorted(set(described.get("foreign_parts", {})) - set(options))
        if missing:
            asked = ", ".join(f"{name}={described['foreign_parts'][name]}(...)" for name in missing)
            raise ValueError(f"{cls.__name__}.from_pretrained: this model was saved with parts of its own, give them: {asked}.")
        model = cls(config_from_dict(cls.config_class, described["config"]))
        for name, part in options.items():
            setattr(model, name, part)
        model.processor = GresProcessor(
            **described["processor"], tokenizer=_saved_tokenizer(model_id, hub, model.processor.tokenizer)
        )
        model._load_weights(find_file(model_id, WEIGHTS_FILE, **hub), strict)
        return model.to(map_location).eval()

    def _load_weights(self, path: str, strict: bool) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        who = f"{type(self).__name__}.from_pretrained"
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{who}: {Path(path).name} must be a safetensors file, got one that cannot be read ({error})."
            ) from error
        own = {name: tensor.shape for name, tensor in self.state_dict().items()}
        wrong = sorted(name for name in own.keys() & weights.keys() if own[name] != weights[name].shape)
        lost, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if wrong or (strict and (lost or extra)):
            counts = f"{len(lost)} missing, {len(extra)} unknown, {len(wrong)} of another shape"
            raise ValueError(f"{who}: {Path(path).name} must fit the config, got {counts}, first: {(wrong + lost + extra)[0]}.")
        self.load_state_dict(weights, strict=strict)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A short model card: what it is, how to load it, its size."""
        count = sum(parameter.numel() for parameter in self.parameters())
        lines = [
            "---",
            "library_name: gresbox",
            "pipeline_tag: image-segmentation",
            "tags:",
            "- referring-expression-segmentation",
            "- gres",
            "---",
            f"# {type(self).__name__}",
            f"{count / 1e6:.2f} M parameters, pictures at {self.processor.image_size} px, made with gresbox {__version__}.",
            "",
            "```python",
            "from gresbox import load_model",
            "",
            'model = load_model("this/repository")',
            'prediction = model.predict(image, "the two dogs on the left")',
            "```",
        ]
        return ModelCard("\n".join(lines) + "\n")


def find_file(model_id: str, name: str, **hub: Any) -> str:
    """Path of a model's file: in a folder, or from the Hugging Face hub.

    The hub is asked for ids of the form owner/name alone, and not where ``owner`` is a folder here: then it is a path.

    Raises:
        FileNotFoundError: If the folder has no such file, or there is neither a folder nor a hub repository of that name.
    """
    if os.path.isdir(model_id):
        path = Path(model_id) / name
        if not path.is_file():
            raise FileNotFoundError(f"load_model: {model_id} must hold {name}, got a folder without it.")
        return str(path)
    owner, _, repository = model_id.partition("/")
    if not owner or not repository or "/" in repository or owner.startswith((".", "~")) or os.path.isdir(owner):
        raise FileNotFoundError(f"load_model: no folder {model_id}; the hub is asked for owner/name, if owner is no folder here.")
    try:
        return hf_hub_download(model_id, name, **hub)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"load_model: no folder {model_id}, and the hub gave no {name} for it ({reason}).") from error


def read_config(model_id: str, **hub: Any) -> dict[str, Any]:
    """The contents of a saved model's config.json.

    Raises:
        ValueError: If it is not one of ours.
    """
    path = find_file(model_id, CONFIG_FILE, **hub)
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_model: {CONFIG_FILE} must be JSON, got a file that cannot be read ({error}).") from error
    kinds = {"model_class": str, "config": dict, "processor": dict}
    if not isinstance(described, dict) or not all(isinstance(described.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"load_model: {CONFIG_FILE} must be one that gresbox wrote (model_class, config, processor), got another.")
    return described


def _saved_tokenizer(model_id: str, hub: dict[str, Any], built: Any) -> Any:
    """The tokenizer that was saved with the model, else the one that the config built."""
    if os.path.isdir(model_id) and not (Path(model_id) / "tokenizer_config.json").is_file():
        return built
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_id, **{key: value for key, value in hub.items() if key != "force_download"})


def _class_name(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _resize(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if 0 in logits.shape:
        return logits.new_zeros(*logits.shape[:2], *size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
