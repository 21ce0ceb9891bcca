"""Names for people, from class ids."""

import re
from collections.abc import Iterable

from timm.data import ImageNetInfo

WORDNET_ID = re.compile(r"n\d{8}")


def readable_names(classes: Iterable[str]) -> tuple[str, ...]:
    """Return the first WordNet synonym of each ImageNet synset id; any other id is its own name.

    >>> readable_names(["n02123394", "n04399382", "zebra crossing"])
    ('Persian cat', 'teddy', 'zebra crossing')
    """
    classes = tuple(classes)
    if not any(WORDNET_ID.fullmatch(name) for name in classes):
        return classes
    lemmas = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    # Only the smaller set has the teddy bear.
    lemmas |= ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    return tuple(lemmas.get(name, name).split(",")[0] for name in classes)
