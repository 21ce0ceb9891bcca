"""Trained networks to the Hugging Face Hub: `gmarpp push --ckpt_path best.ckpt --repo you/name`."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from timm.models._hub import save_for_hf  # timm.models exports push_to_hf_hub alone, which takes no card of one's own
from torch import nn

from gmarpp.command import run_function
from gmarpp.files import expand_path, find_path, first_line
from gmarpp.network.files.load import load_model
from gmarpp.network.preprocessing import get_image_size

logger = logging.getLogger(__name__)

CARD = "README.md"


def push(
    ckpt_path: str,
    repo: str,
    card: str | None = None,
    private: bool = False,
    message: str = "Add the network",
    architecture: str | None = None,
) -> None:
    """Push a trained network with its classes, preprocessing and model card to the Hugging Face Hub, in timm's format.

    Weights (safetensors), configuration and card arrive in one commit, or not at all. `HF_TOKEN`, or `hf auth login`,
    says who you are, and `HF_ENDPOINT` names another Hub.

    Args:
        ckpt_path: anything that `gmarpp.load_model` reads.
        repo: the repository, `owner/name`, which is made where it is missing.
        card: the model card, Markdown; by default the one beside the checkpoint (`best.md` of `best.ckpt`), or else a
            short one, unless the repository has one already.
        private: make a missing repository private.
        message: of the commit.
        architecture: timm's name of the network, for files that do not record it.

    Raises:
        ValueError: the name of the repository, or a network that timm's format cannot describe.
        FileNotFoundError: there is no such checkpoint or card.
        ConnectionError: the Hub cannot be reached, or refuses.
    """
    if repo.count("/") != 1:
        raise ValueError(f"--repo: expected owner/name, got {repo!r}")
    text = _card_text(ckpt_path, card)
    model = load_model(ckpt_path, architecture)
    with TemporaryDirectory() as folder:
        save_for_timm(model, Path(folder))
        try:
            api = HfApi(library_name="gmarpp")
            name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
            if text is not None or not api.file_exists(name, CARD):
                described = text or _short_card(model, name)
                (Path(folder) / CARD).write_text(f"{described.rstrip()}\n\n{_usage(name)}", encoding="utf-8")
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except HFValidationError:
            raise
        except Exception as error:  # of whatever kind: it depends on the network and on the Hub
            raise ConnectionError(
                f"{repo} could not be pushed to the Hugging Face Hub ({first_line(error)}): log in with `hf auth "
                "login`, or set HF_TOKEN to a token that may write there"
            ) from error
    logger.info("%s", commit.commit_url)


def save_for_timm(model: nn.Module, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, from which `timm.create_model` and `gmarpp.load_model` rebuild it.

    Args:
        model: a network from `load_model`.
        folder: an empty one.

    Raises:
        ValueError: the network has options that timm's format cannot hold.
    """
    network: Any = model
    options = {**network.model_args}
    if "layer_norm_eps" in options:
        raise ValueError(
            "timm's format cannot hold layer_norm_eps, which this network has: share the file that "
            "`gmarpp export --output model.safetensors` writes instead"
        )
    if hasattr(getattr(network, "patch_embed", None), "img_size"):
        options["img_size"] = list(get_image_size(model))
    labels: dict[str, Any] = {}
    if network.classes:
        labels["label_names"] = list(network.classes)
        labels["label_descriptions"] = dict(zip(network.classes, network.class_names or network.classes, strict=True))
    save_for_hf(model, str(folder), model_config=labels, model_args=options, safe_serialization=True)


def _card_text(ckpt_path: str, card: str | None) -> str | None:
    """Return the model card that was named, or that lies beside the checkpoint; None if there is none."""
    path = find_path(ckpt_path).with_suffix(".md") if card is None else expand_path(card)
    if card is None and not path.is_file():
        return None
    return path.read_text(encoding="utf-8")


def _short_card(model: nn.Module, repo: str) -> str:
    network: Any = model
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-transformer", "gmarpp"],
    )
    names = network.class_names
    listed = f": {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo.partition('/')[2]}\n\n"
        f"{network.pretrained_cfg['architecture']} for {network.num_classes} classes{listed}.\n"
    )


def _usage(repo: str) -> str:
    return (
        "## From the Hub\n\n```python\nimport gmarpp\nimport timm\nfrom huggingface_hub import snapshot_download\n\n"
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True)\n'
        f'model = gmarpp.load_model(snapshot_download("{repo}"))  # with its classes, to be explained\n```\n'
    )


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one line on stderr and a status other than 0."""
    run_function(push, args, "gmarpp push")
