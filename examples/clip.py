"""Show where a CLIP sees texts in a photograph.

    python examples/clip.py PHOTOGRAPH openai/clip-vit-base-patch16 "a cat" "a dog"

The second argument is a network of the Hugging Face Hub, which transformers downloads, or a folder that holds one.
"""

import sys

import transformers
from PIL import Image

import gmarpp
from gmarpp.targets import Text

if len(sys.argv) < 4:
    sys.exit(__doc__)
photograph, name, *texts = sys.argv[1:]
model = transformers.AutoModel.from_pretrained(name).eval()
processor = transformers.AutoProcessor.from_pretrained(name)
images = processor(images=Image.open(photograph).convert("RGB"), return_tensors="pt")["pixel_values"]
explanation = gmarpp.explain(model, images, ["gmarpp_balanced", "legrad"], Text(model, processor, texts))
explanation.show().savefig("texts.png")
print(dict(zip(texts, explanation.scores[0].tolist(), strict=True)), "- see texts.png")
