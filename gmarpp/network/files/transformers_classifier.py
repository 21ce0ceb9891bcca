"""Classifiers of transformers, built by transformers itself; it is imported only when there is one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gmarpp.files import first_line
from gmarpp.network.files.state_dict import at_most_parameters, require_finite, some
from gmarpp.network.files.weights import Weights

# No classifier has this many times the parameters that its file has.
MAX_MISSING = 2


def build_classifier(weights: Weights) -> nn.Module:
    """Build the classifier that a folder describes, with its weights, by transformers; nothing in it runs as code.

    Args:
        weights: of a folder, with transformers' configuration.

    Returns:
        The network in evaluation mode and float32, with `classes`, `class_names`, `num_classes` and `pretrained_cfg`
        as `load_model` has them; the last only where the folder holds the configuration of an image processor.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: the network is no classifier, or weights are missing, unknown or of other shapes; naming the folder.
    """
    kind = _classifier(weights)
    if "quantization_config" in weights.configuration:
        raise ValueError(f"{weights.origin} holds quantized weights: expected plain ones, in 16 or 32 bits")
    with _without_reports():
        try:
            config = kind.config_class.from_dict(dict(weights.configuration))
            with torch.device("meta"), at_most_parameters(1000 + 4 * len(weights.state)):
                outline = kind(config)
            _require_size(outline, weights)
            model, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights.state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation="sdpa",
            )
        # The folder alone decides which kind of error is raised here.
        except Exception as error:
            raise ValueError(
                f"{weights.origin} does not describe a {kind.__name__} that can be built: {first_line(error)}"
            ) from error
    _require_loaded(found, weights, kind.__name__)
    model = model.float().eval()
    require_finite(model, weights.origin)
    model.classes, model.class_names, model.num_classes = weights.classes, weights.class_names, config.num_labels
    if weights.preprocessing:
        assert weights.image_size is not None
        values = {key: tuple(each) if isinstance(each, list) else each for key, each in weights.preprocessing.items()}
        model.pretrained_cfg = {**values, "input_size": (3, *weights.image_size)}
    network: nn.Module = model
    return network


def _classifier(weights: Weights) -> Any:
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as FAMILIES
    except ImportError as error:
        raise ModuleNotFoundError(f"{weights.origin} is a network of transformers: pip install transformers") from error
    known = {model_type: (names,) if isinstance(names, str) else names for model_type, names in FAMILIES.items()}
    model_type, named = weights.configuration.get("model_type"), weights.configuration.get("architectures")
    candidates = known.get(model_type, ()) if isinstance(model_type, str) else ()
    name = named[0] if isinstance(named, list) and named else next(iter(candidates), None)
    if not isinstance(name, str) or name not in candidates:
        raise ValueError(
            f"{weights.origin} holds a {name or model_type or 'network without model_type'}, which is no classifier of "
            "images: expected timm's folders, or those of transformers' …ForImageClassification; networks without "
            "classes are explained in Python, with a function of the output as target"
        )
    if model_type == "siglip2":
        raise ValueError(f"{weights.origin} holds a {name}, which takes patches that its processor makes, not images")
    return getattr(transformers, name)


def _require_size(outline: nn.Module, weights: Weights) -> None:
    expected = sum(parameter.numel() for parameter in outline.parameters())
    given = sum(value.numel() for value in weights.state.values())
    if expected > MAX_MISSING * given:
        raise ValueError(f"it would have {expected} parameters, and the folder holds {given}")


def _require_loaded(found: Any, weights: Weights, name: str) -> None:
    problems = []
    for what, label in (("missing", "missing"), ("unexpected", "unknown"), ("mismatched", "of another shape")):
        keys = sorted(str(each[0] if isinstance(each, tuple) else each) for each in found[f"{what}_keys"])
        if keys:
            problems.append(f"{len(keys)} {label} ({some(keys)})")
    if problems:
        raise ValueError(
            f"{weights.origin} does not fit its configuration, {name}: {'; '.join(problems)}; save weights and "
            "config.json together, by save_pretrained"
        )


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silence what transformers says of weights: it becomes an error."""
    from transformers.utils import logging as reports

    level, shows_progress = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if shows_progress:
            reports.enable_progress_bar()
