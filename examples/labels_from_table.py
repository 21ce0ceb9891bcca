"""Learn labels that do not exclude each other from a table of one's own, and explain each label of an image.

    python examples/labels_from_table.py TABLE.csv LABEL LABEL ...

The table has a column `path`, of pictures beside it, and a column of 1 and 0 for each label.
"""

import sys

import lightning as L

from gmarpp.data import Table
from gmarpp.explainer import Explainer
from gmarpp.training.module import ViTClassifier

CHECKPOINT = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"

if len(sys.argv) < 2:
    sys.exit(__doc__)
table, *labels = sys.argv[1:]
data = Table(table, label_columns=labels, val_share=0.2, batch_size=8, num_workers=0)
options = {"architecture": "vit_small_patch14_dinov2", "weights": CHECKPOINT}
classifier = ViTClassifier(task="multilabel", num_classes=len(labels), **options)
trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
trainer.fit(classifier, data)
print(trainer.callback_metrics)

explainer = Explainer(["gmarpp_balanced", "rollout"], target="label", metrics=["insertion_auc", "deletion_auc"])
for batch in data.val_dataloader():
    explained = explainer(classifier.model, batch)
    for row, target in enumerate(explained.target.tolist() if explained else []):
        values = {name: round(value[row].item(), 3) for name, value in explained.values["gmarpp_balanced"].items()}
        print(explained.path[row], labels[target], values)
