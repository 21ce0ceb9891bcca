"""The command line's options of a network that trains in seconds."""

MODEL = [
    "--model.architecture=test_vit",
    "--model.num_classes=3",
    "--model.image_size=32",
    "--model.pretrained=false",
    "--model.model_args={depth: 2}",
]
