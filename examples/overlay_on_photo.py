"""Lay maps on a whole photograph, and save raw maps, overlays and a figure.

python examples/overlay_on_photo.py PHOTOGRAPH CHECKPOINT [FOLDER]
"""

import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing

if len(sys.argv) < 3:
    sys.exit(__doc__)
photo, folder = Image.open(sys.argv[1]).convert("RGB"), Path(sys.argv[3] if len(sys.argv) > 3 else "explained")
model = gmarpp.load_model(sys.argv[2])
preprocessing = Preprocessing.of(model)
image = EvaluationTransform(preprocessing)(pil_to_tensor(photo))["image"]
explanation = gmarpp.explain(model, image[None], ["gmarpp_l1", "rollout", "token_relevance"])
region = preprocessing.region(photo.height, photo.width)  # the part of the photograph that the network saw
explanation.save(folder, originals=[photo], regions=[region])
explanation.save(folder / "figure.pdf")
