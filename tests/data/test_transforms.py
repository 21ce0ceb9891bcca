import math
import pickle

import pytest
import timm
import torch
from miniature import picture
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.v2.functional import pil_to_tensor

from gmarpp.data import Augmentation, EvaluationTransform, Preprocessing, TrainingTransform, denormalize

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def smooth_picture(width, height):
    small = picture(0, (7, 5))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", [(64, 64), (100, 61), (61, 100), (301, 200)])
@pytest.mark.parametrize(
    ("size", "interpolation", "crop_pct", "crop_mode"),
    [
        ((56, 56), "bicubic", 0.9, "center"),
        ((112, 112), "bilinear", 1.0, "center"),
        ((56, 56), "bicubic", 0.875, "squash"),
        ((40, 60), "bicubic", 0.95, "center"),
    ],
)
def test_evaluation_equals_timm(shape, size, interpolation, crop_pct, crop_mode):
    image = smooth_picture(*shape)
    preprocessing = Preprocessing(size, **IMAGENET, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
    reference = create_transform(
        (3, *size), interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, **IMAGENET
    )
    ours = EvaluationTransform(preprocessing)(pil_to_tensor(image))["image"]
    theirs = reference(image)
    levels = 255 * (ours - theirs).abs() * torch.tensor(IMAGENET["std"]).view(3, 1, 1)
    assert ours.shape == theirs.shape
    assert levels.max() < 2.1  # Pillow and torch round differently
    assert levels.mean() < 0.3


def test_box_and_mask_by_hand():
    # 100×50 at crop_pct 0.8 to 40×40: resized to 100×50, so the crop is x from 30 to 70 and y from 5 to 45
    transform = EvaluationTransform(Preprocessing((40, 40), **IMAGENET, crop_pct=0.8))
    mask = torch.zeros(50, 100, dtype=torch.bool)
    mask[10:20, 35:95] = True
    sample = transform(torch.zeros(3, 50, 100, dtype=torch.uint8), torch.tensor([35.0, 10.0, 95.0, 20.0]), mask)
    assert sample["box"].tolist() == [5, 5, 40, 15]
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[5:15, 5:40] = True
    assert sample["mask"].dtype == torch.bool
    assert torch.equal(sample["mask"], expected)
    assert all(type(value) is torch.Tensor for value in sample.values())


@pytest.mark.parametrize(("side", "size"), [(60, 84), (96, 224), (500, 256), (640, 256)])
def test_a_mask_stays_where_its_object_is(side, size):
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    mask = (x - 0.55) ** 2 + (y - 0.4) ** 2 < 0.3**2
    image = mask.to(torch.uint8).mul(255).expand(3, -1, -1)
    plain = Preprocessing((size, size), (0.0,) * 3, (1.0,) * 3)
    sample = EvaluationTransform(plain)(image, None, mask)
    places = torch.arange(size, dtype=torch.float64)
    for axis in (0, 1):
        bright, masked = sample["image"][0].double().sum(axis), sample["mask"].double().sum(axis)
        centers = [(each * places).sum() / each.sum() for each in (bright, masked)]
        assert abs(centers[0] - centers[1]) < 0.2


def test_box_and_mask_follow_a_drawn_rectangle():
    image, mask = torch.zeros(3, 48, 80, dtype=torch.uint8), torch.zeros(48, 80, dtype=torch.bool)
    image[:, 12:30, 30:50] = 255
    mask[12:30, 30:50] = True
    transform = EvaluationTransform(Preprocessing((96, 96), (0, 0, 0), (1, 1, 1), "bilinear"))
    sample = transform(image, torch.tensor([30.0, 12.0, 50.0, 30.0]), mask)
    bright = sample["image"][0] > 0.5
    rows, columns = torch.nonzero(bright.any(dim=1)), torch.nonzero(bright.any(dim=0))
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sample["box"].tolist() == [float(corner) for corner in drawn]
    assert torch.equal(sample["mask"], bright)


def test_box_outside_the_crop_has_no_area():
    transform = EvaluationTransform(Preprocessing((10, 10), **IMAGENET))
    x0, y0, x1, y1 = transform(torch.zeros(3, 10, 40, dtype=torch.uint8), torch.tensor([0.0, 2.0, 5.0, 8.0]))["box"]
    assert (x1 - x0) * (y1 - y0) == 0


def test_preprocessing_of_a_network():
    options = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", img_size=(32, 48), **options)
    found = Preprocessing.of(model)
    assert found == Preprocessing((32, 48), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)
    dynamic = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, **options)
    assert Preprocessing.of(dynamic).size == (224, 224)
    squashed = timm.create_model("vit_tiny_patch16_224", **options, pretrained_cfg_overlay={"crop_mode": "squash"})
    assert Preprocessing.of(squashed).crop_mode == "squash"


def test_preprocessing_of_a_foreign_network_says_what_to_do():
    with pytest.raises(ValueError, match=r"Linear carries no timm data config .*Preprocessing\(size="):
        Preprocessing.of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"size": (0, 8)}, {"std": (1.0, 0.0, 1.0)}, {"interpolation": "lanczos"}, {"crop_pct": 1.2}, {"crop_mode": "pad"}],
)
def test_preprocessing_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"size|std|interpolation|crop"):
        Preprocessing(**{"size": (8, 8), **IMAGENET, **wrong})


def test_denormalize_inverts_the_evaluation():
    preprocessing = Preprocessing((64, 64), **IMAGENET)
    image = pil_to_tensor(picture(3))
    batch = EvaluationTransform(preprocessing)(image)["image"][None]
    assert torch.allclose(denormalize(batch, preprocessing), image[None] / 255, atol=1e-6)


@pytest.mark.parametrize("policy", ["none", "randaugment", "trivialaugment"])
def test_training_transform_follows_the_generator(policy):
    preprocessing = Preprocessing((24, 32), **IMAGENET)
    transform = pickle.loads(pickle.dumps(TrainingTransform(preprocessing, Augmentation(policy=policy, erasing=0.5))))
    image = pil_to_tensor(picture(1))
    torch.manual_seed(5)
    first, second = transform(image)["image"], transform(image)["image"]
    torch.manual_seed(5)
    assert torch.equal(transform(image)["image"], first)
    assert not torch.equal(first, second)
    assert first.shape == (3, 24, 32)
    assert first.dtype == torch.float32


def test_training_drops_what_it_cannot_move():
    transform = TrainingTransform(Preprocessing((8, 8), **IMAGENET), Augmentation())
    image = pil_to_tensor(picture(1))
    assert set(transform(image, torch.zeros(4), torch.zeros(64, 64, dtype=torch.bool))) == {"image"}


def test_crop_scale_is_the_part_of_the_area():
    # horizontal position encoded as brightness: the brightness range of a crop is its width
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    preprocessing = Preprocessing((64, 64), (0, 0, 0), (1, 1, 1), "bilinear")
    transform = TrainingTransform(preprocessing, Augmentation(scale=(0.25, 0.25), horizontal_flip=0))
    for seed in range(20):
        torch.manual_seed(seed)
        row = transform(ramp)["image"][0, 32] * 255
        width = (row[-1] - row[0]).item() * 64 / 63
        # area 0.25 of 256² at an aspect ratio from 3/4 to 4/3
        assert 128 * math.sqrt(3 / 4) - 4 < width < 128 * math.sqrt(4 / 3) + 4


def test_flip_is_certain_at_probability_one():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    transform = TrainingTransform(Preprocessing((64, 64), **IMAGENET), Augmentation(horizontal_flip=1))
    image = transform(ramp)["image"]
    assert (image[0, :, 0] > image[0, :, -1]).all()


def test_erasing_fills_a_rectangle_with_normal_noise():
    preprocessing = Preprocessing((64, 64), (0, 0, 0), (1, 1, 1))
    transform = TrainingTransform(preprocessing, Augmentation(erasing=1.0))
    areas, noise = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        image = transform(torch.zeros(3, 64, 64, dtype=torch.uint8))["image"]
        erased = (image != 0).any(dim=0)
        rows, columns = erased.any(dim=1).sum().item(), erased.any(dim=0).sum().item()
        assert erased.sum().item() == rows * columns  # a rectangle
        areas.append(rows * columns / 64**2)
        noise.append(image[:, erased].flatten())
    assert 0.01 < min(areas) < 0.1
    assert 0.2 < max(areas) < 0.35
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05


def test_augmentation_out_of_range():
    with pytest.raises(ValueError, match="scale"):
        Augmentation(scale=(0.5, 1.5))


def test_policies_fill_with_the_mean_color():
    preprocessing = Preprocessing((64, 64), (1.0, 0.0, 0.0), (1, 1, 1))
    augmentation = Augmentation(scale=(1, 1), horizontal_flip=0, policy="randaugment", operations=8, magnitude=25)
    transform = TrainingTransform(preprocessing, augmentation)
    filled = 0
    for seed in range(10):
        torch.manual_seed(seed)
        # normalized by mean (1, 0, 0), the mean color is zero and the gray of the image is not
        image = transform(torch.full((3, 64, 64), 128, dtype=torch.uint8))["image"]
        filled += int((image.abs() < 0.05).all(dim=0).any())
    assert filled >= 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scale", (0.5,)),
        ("scale", (0.9, 0.5)),
        ("scale", (math.nan, 1)),
        ("horizontal_flip", -0.1),
        ("horizontal_flip", math.nan),
        ("erasing", 1.5),
        ("policy", "autoaugment"),
        ("operations", 0),
        ("magnitude", -1),
        ("magnitude", 99),
    ],
)
def test_augmentation_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"augmentation: .*{option}"):
        Augmentation(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", (32,)),
        ("size", (32, 32, 32)),
        ("size", (0, 32)),
        ("size", (32, 32.5)),
        ("size", (8, 10**6)),
        ("mean", (0.5, 0.5)),
        ("mean", (0.5, 0.5, math.nan)),
        ("mean", (127.5, 127.5, 127.5)),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (0.5, 0.5, math.inf)),
        ("interpolation", "cubic"),
        ("crop_pct", 0),
        ("crop_mode", "border"),
    ],
)
def test_preprocessing_out_of_range_is_named(option, value):
    options = {"size": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), option: value}
    with pytest.raises(ValueError, match=f"preprocessing: .*{option}"):
        Preprocessing(**options)


@pytest.mark.parametrize("magnitude", [0, 30])
def test_both_ends_of_the_magnitudes_are_applied(magnitude):
    augmentation = Augmentation(policy="randaugment", magnitude=magnitude)
    transform = TrainingTransform(Preprocessing((8, 8), **IMAGENET), augmentation)
    for seed in range(20):
        torch.manual_seed(seed)
        assert transform(pil_to_tensor(picture(1)))["image"].isfinite().all()


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_the_region_of_an_input_is_where_its_pixels_come_from(size, crop_mode):
    preprocessing = Preprocessing(size, (0, 0, 0), (1 / 255,) * 3, "bilinear", crop_pct=0.75, crop_mode=crop_mode)
    # A picture whose pixels tell where they are: the centers of their columns and rows.
    y, x = torch.meshgrid(torch.arange(150) + 0.5, torch.arange(250) + 0.5, indexing="ij")
    seen = EvaluationTransform(preprocessing)(torch.stack([x, y, x]).round().byte())["image"]
    x0, y0, x1, y1 = preprocessing.region(150, 250)
    columns, rows = seen[0].mean(dim=0), seen[1].mean(dim=1)
    step_x, step_y = (x1 - x0) / size[1], (y1 - y0) / size[0]
    assert columns[[0, -1]].tolist() == pytest.approx([x0 + step_x / 2, x1 - step_x / 2], abs=0.8)
    assert rows[[0, -1]].tolist() == pytest.approx([y0 + step_y / 2, y1 - step_y / 2], abs=0.8)
    part = preprocessing.region(150, 250, (size[0] // 2, size[1] // 4))
    assert part == pytest.approx((x0, y0, x0 + (x1 - x0) / 4, y0 + (y1 - y0) / 2))
