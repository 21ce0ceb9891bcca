"""What of an output can be explained besides a class: its likeness to a text, a region, a detected object."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.attribution.target import ImageScore
from gmarpp.metrics.functional import boxes_to_masks
from gmarpp.network.modes import evaluation_mode

__all__ = ["Query", "Region", "Text"]


_TEXT_HALVES = ("get_text_features", "encode_text")


class Text(ImageScore):
    """Similarity of images to texts: the cosine of their embeddings, scaled and shifted as the network does.

    For networks of images and texts, of transformers (CLIP, SigLIP, MetaCLIP 2, AltCLIP, …) and open_clip, and for
    their image towers with projection. The score equals the network's `logits_per_image`.

    Args:
        model: the whole network, of which the text half runs once, here.
        processor: its processor or tokenizer.
        text: one text for all images, or K of them: scores are (B, K), and maps (B, K, h, w).

    Raises:
        ValueError: for another network, no text, or one that is longer than the network takes.
    """

    def __init__(self, model: nn.Module, processor: Any, text: str | Sequence[str]) -> None:
        if not hasattr(model, "logit_scale") or not any(hasattr(model, half) for half in _TEXT_HALVES):
            raise ValueError(
                "Text: expected a network of images and texts, with logit_scale and get_text_features or encode_text, "
                f"got {type(model).__name__}: give the whole network, also where its image tower is explained"
            )
        self.names = (text,) if isinstance(text, str) else tuple(text)
        if not self.names:
            raise ValueError("Text: expected at least one text, got none")
        self._is_one = isinstance(text, str)
        whole: Any = model
        # Its image half projects what it pools, so that what it pools is no embedding yet.
        self._has_projection = hasattr(model, "visual_projection")
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):
            self._embeddings = F.normalize(_text_embeddings(whole, processor, list(self.names)).float(), dim=1)
            self._scale = whole.logit_scale.detach().float().exp()
            bias = getattr(whole, "logit_bias", None)
            self._bias = torch.zeros(()) if bias is None else bias.detach().float()

    def of(self, output: Any, rows: Tensor | slice) -> Tensor:
        """Return the scores, (n,) or (n, K); the text is the same for all images."""
        images = F.normalize(self._image_embeddings(output).float(), dim=1)
        cosines = (images[:, None] * self._embeddings.to(images.device)).sum(dim=2)
        scores: Tensor = cosines * self._scale.to(images.device) + self._bias.to(images.device)
        return scores[:, 0] if self._is_one else scores

    def _image_embeddings(self, output: Any) -> Tensor:
        # Networks of open_clip return several things.
        first = output[0] if isinstance(output, tuple) and output else output
        pooled = () if self._has_projection else ("pooler_output",)
        embeddings = _tensor_of(first, "image_embeds", "image_features", *pooled)
        expected = f"Text: expected embeddings of images of shape (images, {self._embeddings.shape[1]})"
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
            raise ValueError(
                f"{expected}, got {type(output).__name__}: explain the whole network or its tower with projection"
            )
        if embeddings.shape[1] != self._embeddings.shape[1]:
            raise ValueError(f"{expected}, got {tuple(embeddings.shape)}: give the text's own network")
        return embeddings


def _text_embeddings(model: Any, processor: Any, texts: list[str]) -> Tensor:
    device = next(model.parameters()).device
    if not hasattr(model, "get_text_features"):
        if hasattr(processor, "encode"):
            # It would cut long texts; two of its tokens are those of start and end.
            _require_length(max(len(processor.encode(text)) + 2 for text in texts), processor.context_length)
        found: Tensor = model.encode_text(processor(texts).to(device))
        return found
    limit: int = model.config.text_config.max_position_embeddings
    # SigLIP was trained with padding that its text half attends to.
    padded = (
        {"padding": "max_length", "max_length": limit} if "siglip" in model.config.model_type else {"padding": True}
    )
    tokens = processor(text=texts, return_tensors="pt", **padded)
    _require_length(tokens["input_ids"].shape[1], limit)
    features = model.get_text_features(**{name: each.to(device) for name, each in tokens.items()})
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _require_length(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ValueError(f"Text: expected texts of at most {limit} tokens, got {tokens}: shorten them")


class Region(ImageScore):
    """What a segmentation or depth network says of a region: the mean of a class's logit over it.

    The output is a tensor (B, C, h, w), or has it as `logits` or under `"out"`; of depth, (B, h, w), `predicted_depth`.
    It is brought to the mask's size bilinearly, as it is to show it.

    Args:
        where: boolean mask (H, W), or (B, H, W), one per image; or a box (4,) or (B, 4), x0, y0, x1, y1 in pixels,
            right and bottom edges exclusive, of which pixels count whose center lies inside.
        target: index of the class, or one per image, (B,); `None` for an output with one value per place.
        size: height and width in pixels of the image that a box lies on.

    Raises:
        ValueError: for regions without a pixel, a box without `size`, or an output of another form.
    """

    def __init__(
        self, where: Tensor | Sequence[float], target: int | Tensor | None, size: tuple[int, int] | None = None
    ) -> None:
        given = torch.as_tensor(where)
        masks = given if given.dtype == torch.bool else _masks_of(given, size)
        if masks.dim() not in (2, 3):
            raise ValueError(f"Region: expected a mask of shape (H, W) or (images, H, W), got {tuple(masks.shape)}")
        if not masks.flatten(-2).any(dim=-1).all():
            raise ValueError("Region: expected at least one pixel in every mask or box, got none in some")
        self._masks, self._target = masks, None if target is None else _indices("Region: target", target)
        self.images = _images_of(masks if masks.dim() == 3 else None, self._target)

    def of(self, output: Any, rows: Tensor | slice) -> Tensor:
        """Return the scores (n,)."""
        values = self._values(_dense(output), rows)
        masks = (self._masks if self._masks.dim() == 2 else self._masks[_on_host(rows)]).to(values.device)
        values = F.interpolate(values[:, None].float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        weights = masks.float().expand(len(values), -1, -1)
        scores: Tensor = (values[:, 0] * weights).sum((1, 2)) / weights.sum((1, 2))
        return scores

    def _values(self, dense: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the class's values, (n, h, w)."""
        if (dense.dim() == 4) == (self._target is None):
            fitting = "a class" if dense.dim() == 4 else "None"
            raise ValueError(f"Region: target: expected {fitting} for an output of shape {tuple(dense.shape)}")
        if self._target is None:
            return dense
        classes = _entries("Region: target", self._target, rows, dense.shape[1], dense)
        return dense[torch.arange(len(dense), device=dense.device), classes]


class Query(ImageScore):
    """What a detection network says of one object: the logit of a class of one of its queries.

    The output has logits (B, Q, C), as those of YOLOS and DETR.

    Args:
        index: position of the query, that of the box in `pred_boxes`; or one per image, (B,).
        target: index of the class, or one per image, (B,).

    Raises:
        ValueError: for an output of another form, or an index out of range.
    """

    def __init__(self, index: int | Tensor, target: int | Tensor) -> None:
        self._index, self._target = _indices("Query: index", index), _indices("Query: target", target)
        self.images = _images_of(self._index, self._target)

    def of(self, output: Any, rows: Tensor | slice) -> Tensor:
        """Return the scores (n,)."""
        logits = _tensor_of(output, "logits", "pred_logits")
        if logits is None or logits.dim() != 3:
            raise ValueError(f"Query: expected logits of shape (images, queries, classes), got {_form(output, logits)}")
        queries = _entries("Query: index", self._index, rows, logits.shape[1], logits)
        classes = _entries("Query: target", self._target, rows, logits.shape[2], logits)
        return logits[torch.arange(len(logits), device=logits.device), queries, classes]


def _masks_of(boxes: Tensor, size: tuple[int, int] | None) -> Tensor:
    if boxes.dim() not in (1, 2) or boxes.shape[-1] != 4:
        given = f"{boxes.dtype} of shape {tuple(boxes.shape)}"
        raise ValueError(f"Region: expected a boolean mask, or a box x0, y0, x1, y1, got {given}")
    if size is None:
        raise ValueError("Region: expected size=(height, width) of the image with a box, got none")
    masks = boxes_to_masks(boxes.view(-1, 4), size)
    return masks if boxes.dim() == 2 else masks[0]


def _dense(output: Any) -> Tensor:
    dense = _tensor_of(output, "logits", "out", "predicted_depth")
    if dense is None or dense.dim() not in (3, 4):
        raise ValueError(
            "Region: expected an output of shape (images, classes, h, w), or (images, h, w) with a value per place, "
            f"got {_form(output, dense)}"
        )
    return dense


def _tensor_of(output: Any, *names: str) -> Tensor | None:
    """Return an output that is a tensor, or the first of some names in it that is one."""
    if isinstance(output, Tensor):
        return output
    values = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in names)
    found: Tensor | None = next((each for each in values if isinstance(each, Tensor)), None)
    return found


def _form(output: Any, found: Tensor | None) -> str:
    return type(output).__name__ if found is None else f"shape {tuple(found.shape)}"


def _indices(what: str, given: Any) -> Tensor:
    """Return an index, (), or one per image, (B,), long."""
    if isinstance(given, str):
        raise ValueError(
            f"{what}: expected an index, got {given!r}: a network of transformers has it in config.label2id"
        )
    indices = torch.as_tensor(given)
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.dim() > 1 or not indices.numel():
        raise ValueError(f"{what}: expected an index, or one per image, got {indices.dtype} {tuple(indices.shape)}")
    return indices.long().cpu()


def _images_of(*each: Tensor | None) -> int | None:
    """Return how many images are told apart by tensors with an entry per image, if any are."""
    counts = {len(entries) for entries in each if entries is not None and entries.dim() > 0}
    if len(counts) > 1:
        raise ValueError(f"expected entries for one number of images, got {' and '.join(map(str, sorted(counts)))}")
    return counts.pop() if counts else None


def _on_host(rows: Tensor | slice) -> Tensor | slice:
    return rows if isinstance(rows, slice) else rows.cpu()


def _entries(what: str, indices: Tensor, rows: Tensor | slice, count: int, like: Tensor) -> Tensor:
    """Return the indices of n images, (n,), after checking that they lie below a count."""
    if int(indices.min()) < 0 or int(indices.max()) >= count:
        raise ValueError(f"{what}: expected 0 to {count - 1}, got {int(indices.min())} to {int(indices.max())}")
    chosen = indices.expand(len(like)) if indices.dim() == 0 else indices[_on_host(rows)]
    return chosen.to(like.device)
