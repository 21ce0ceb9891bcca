"""The scripts in `examples` that have no test module of their own, run as a user runs them."""

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import gmarpp
from gmarpp.cli.explain import explain_main
from gmarpp.training import module as training

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what a clone has."""
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_page_shows_every_script_that_is_short():
    page = (ROOT / "docs/examples.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f'--8<-- "{path.name}"' in page or f"`examples/{path.name}`" in page, path.name


@pytest.fixture
def run(clone, monkeypatch, capsys):
    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out.splitlines()

    return run_example


def picture(path, size=(60, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_own_lightning_module_is_watched_and_then_explained_by_the_command(clone, run, monkeypatch):
    create = timm.create_model
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **small, **options))
    for index in range(15):
        picture(clone / "photos" / ("ant", "bee", "cat")[index % 3] / f"{index}.png")
    names, printed = run("own_lightning_module.py", "photos")
    trainer = names["trainer"]
    assert float(printed[-1].removeprefix("tensor(").removesuffix(")")) == pytest.approx(
        trainer.callback_metrics["attribution/gmarpp_l1/insertion_auc"].item(), abs=1e-4
    )
    (checkpoint,) = (clone / "lightning_logs").rglob("*.ckpt")
    explain_main(
        ["predict", "--data=ImageFolder", "--data.root=photos", f"--ckpt_path={checkpoint}", "--data.num_workers=0",
         "--model=examples.own_lightning_module.Classifier", "--trainer.accelerator=cpu", "--explain.metrics=[]",
         "--explain.methods=[gmarpp_l1]", "--output=out"]
    )  # fmt: skip
    stored = gmarpp.load_explanations(clone / "out")
    assert len(stored.rows) == 15
    image = Image.open(clone / "photos" / stored.rows[0]["path"])
    module = names["module"].eval()
    seen = names["transform"](image)[None]
    with torch.no_grad():
        assert stored.rows[0]["predicted"] == module.net(seen).argmax().item()
    expected = gmarpp.explain(module.net, seen, "gmarpp_l1", stored.rows[0]["target"]).maps["gmarpp_l1"][0]
    # The pictures are resized by two libraries, which round differently.
    np.testing.assert_allclose(stored.map(0, "gmarpp_l1"), expected.numpy(), rtol=0, atol=0.01 * expected.max().item())


def test_own_method_is_the_fall_of_the_logit(run):
    pytest.importorskip("skimage")
    names, printed = run("own_method.py")
    assert list(names["explained"].values) == ["occlusion", "gmarpp_l1", "random"]
    assert "'insertion_auc': tensor" in printed[0]
    model, images = names["model"], names["images"]
    target = names["explained"].target
    gray = images.clone()
    gray[..., 28:42, 56:70] = 0
    with torch.no_grad():
        falls = model(images)[0, target] - model(gray)[0, target]
    assert names["explained"].maps["occlusion"][0, 2, 4].item() == pytest.approx(falls.item(), rel=1e-3, abs=1e-5)


def test_own_method_is_named_with_its_options_on_the_command_line(clone):
    pytest.importorskip("skimage")
    picture(clone / "photos/1.png")
    checkpoint = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"
    methods = "[{class_path: examples.own_method.Occlusion, init_args: {side: 56}}]"
    explain_main(
        ["predict", f"--ckpt_path={checkpoint}", "--data=ImageFolder", "--data.root=photos", "--data.num_workers=0",
         "--trainer.accelerator=cpu", f"--explain.methods={methods}", "--explain.metrics=[]", "--output=out"]
    )  # fmt: skip
    stored = gmarpp.load_explanations(clone / "out")
    found = np.asarray(stored.map(0, "occlusion"))
    assert stored.signed_methods == ("occlusion",)
    assert found.shape == (8, 8)
    assert len(np.unique(found)) == 4, "squares of 56 of 112 pixels"


def test_own_metric_is_the_exponential_of_the_entropy(run):
    pytest.importorskip("skimage")
    names, printed = run("own_metric.py")
    assert len(printed) == 3
    maps = names["explained"].maps["gmarpp_l1"].double().flatten(1).clamp_min(0)
    shares = maps / maps.sum(1, keepdim=True)
    expected = torch.special.entr(shares).sum(1).exp()
    values = names["explained"].values["gmarpp_l1"]["patches_used"].double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    even = names["patches_used"](torch.ones(2, 3, 4), reduction="none")
    torch.testing.assert_close(even, torch.full((2,), 12.0))


def test_labels_from_a_table_are_learned_and_explained_one_by_one(clone, run, monkeypatch):
    def small(task, num_classes, **_):
        return classifier("test_vit", num_classes, 32, pretrained=False, model_args={"depth": 2}, task=task)

    classifier = training.ViTClassifier
    monkeypatch.setattr(training, "ViTClassifier", small)
    rows = [(f"{index}.png", index % 2, int(index % 3 == 0)) for index in range(20)]
    for name, *_ in rows:
        picture(clone / "photos" / name)
    with (clone / "photos/labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "cat", "cup"), *rows])
    names, printed = run("labels_from_table.py", "photos/labels.csv", "cat", "cup")
    explained = [tuple(line.split()[:2]) for line in printed if line.split()[0].endswith(".png")]
    held_out = {sample["path"] for sample in names["data"].datasets["val"]}
    assert len(held_out) == 4
    expected = [
        (path, label) for path, *flags in rows for label, flag in zip(("cat", "cup"), flags, strict=True) if flag
    ]
    assert sorted(explained) == sorted(pair for pair in expected if pair[0] in held_out)


def test_what_speaks_for_coffee_against_a_cat_lies_on_the_coffee(clone, run):
    pytest.importorskip("skimage")
    names, printed = run("one_against_another.py")
    assert [line.split()[0] for line in printed] == ["token_relevance", "gmarpp_l1", "rollout"]
    assert "'relevance on the coffee': 0.9" in printed[0]
    with torch.no_grad():
        logits = names["model"](names["image"])
    classes = [names["model"].class_names.index(name) for name in ("espresso", "Egyptian cat")]
    difference = (logits[0, classes[0]] - logits[0, classes[1]]).item()
    assert names["explanation"].scores.item() == pytest.approx(difference, rel=1e-3)
    probabilities = logits.softmax(1)[0]
    whole = (probabilities[classes[0]] - probabilities[classes[1]]).item()
    assert names["curves"].insertion[0, -1].item() == pytest.approx(whole, rel=1e-3)
    assert (clone / "one_against_another.png").stat().st_size > 1000


def test_another_librarys_methods_stand_beside_ours(clone, run):
    captum = pytest.importorskip("captum.attr")
    names, printed = run("outside_method.py", picture(clone / "photo.png"))
    assert [line.split()[0] for line in printed] == ["integrated_gradients", "gradient_shap", "gmarpp_l1"]
    found = names["explanation"]
    pixels = captum.IntegratedGradients(names["model"]).attribute(names["images"], target=found.target, n_steps=16)
    expected = torch.nn.functional.avg_pool2d(pixels.mean(1), 14).float()
    torch.testing.assert_close(found.maps["integrated_gradients"], expected, rtol=1e-3, atol=1e-7)


def test_a_network_of_torchvision_is_explained(clone, run, monkeypatch):
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(224, 16, 1, 2, 32, 64)
    torch.nn.init.normal_(network.heads.head.weight)
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda weights: network)
    torch.save(network.state_dict(), clone / "weights.pth")
    names, printed = run("torchvision_vit.py", picture(clone / "photo.png"), clone / "weights.pth")
    with torch.no_grad():
        predicted = network.eval()(names["image"]).argmax().item()
    assert printed == [f"predicted {network.class_names[predicted]} - see overlay.png and methods.png"]
    assert Image.open(clone / "overlay.png").size == (224, 224)
    assert Image.open(clone / "methods.png").width > 300
