import numpy as np
import pytest
from miniature import PLAIN
from PIL import Image
from sklearn.datasets import load_digits

from gmarpp.data import Digits
from gmarpp.data.digits import LUMA, NAMES, draw_digit, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder, train_images=12, val_images=5, seed=1)
    return folder


def boxes(folder):
    """Path, class and corners of all images."""
    rows = []
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        file, name, *corners = line.split("\t")
        rows.append((f"val/images/{file}", name, [int(corner) for corner in corners]))
    for boxes_file in sorted(folder.glob("train/*/*_boxes.txt")):
        for line in boxes_file.read_text().splitlines():
            file, *corners = line.split("\t")
            name = boxes_file.parent.name
            rows.append((f"train/{name}/images/{file}", name, [int(corner) for corner in corners]))
    return rows


def samples(folder):
    return {path: int(sample) for path, sample in (line.split("\t") for line in (folder / "samples.txt").open())}


def test_layout_is_the_official_one(digits):
    assert sorted(path.name for path in digits.iterdir()) == ["samples.txt", "train", "val", "wnids.txt", "words.txt"]
    assert sorted(path.name for path in (digits / "train").iterdir()) == [f"digit_{k}" for k in range(10)]
    assert len(list(digits.glob("train/*/images/*.JPEG"))) == 120
    assert len(list(digits.glob("val/images/*.JPEG"))) == 50
    for path, _, (x0, y0, x1, y1) in boxes(digits):
        with Image.open(digits / path) as image:
            assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "JPEG")
        assert 0 <= x0 < x1 <= 63
        assert 0 <= y0 < y1 <= 63


def test_labels_are_those_of_the_handwritten_samples_and_no_sample_is_in_both_splits(digits):
    targets, drawn = load_digits().target, samples(digits)
    assert len(drawn) == len(boxes(digits)) == 170
    assert all(name == f"digit_{targets[drawn[path]]}" for path, name, _ in boxes(digits))
    train = {sample for path, sample in drawn.items() if path.startswith("train")}
    val = {sample for path, sample in drawn.items() if path.startswith("val")}
    assert len(train) == 120
    assert not train & val


def test_splits_stay_apart_when_samples_are_used_again(tmp_path, monkeypatch):
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr("gmarpp.data.digits.draw_digit", lambda *_: (blank, (0, 0, 1, 1)))
    write_digits(tmp_path / "digits", train_images=150, val_images=40)
    drawn = samples(tmp_path / "digits")
    train = {sample for path, sample in drawn.items() if path.startswith("train")}
    val = {sample for path, sample in drawn.items() if path.startswith("val")}
    assert not train & val
    assert len(train | val) == 1797


def test_seed_decides_the_pictures(digits, tmp_path):
    for seed in (1, 2):
        write_digits(tmp_path / str(seed), train_images=12, val_images=5, seed=seed)
    path = "val/images/val_3.JPEG"
    assert (tmp_path / "1" / path).read_bytes() == (digits / path).read_bytes()
    assert (tmp_path / "2" / path).read_bytes() != (digits / path).read_bytes()


@pytest.mark.parametrize("level", [0, 90, 127, 128, 170, 255])
def test_digit_is_legible_and_boxed_on_any_ground(level):
    generator = np.random.default_rng(level)
    ground = Image.fromarray(np.full((200, 300, 3), level, np.uint8))
    for strokes in load_digits().images[:20] / 16:
        image, (x0, y0, x1, y1) = draw_digit(strokes, ground, generator)
        difference = np.abs(np.asarray(image, dtype=float) @ LUMA - level)
        inside = difference[y0 : y1 + 1, x0 : x1 + 1]
        assert (inside > 100).mean() > 0.1
        # what is outside of the box is the soft rim at most, and none of it far outside
        outside = difference.copy()
        outside[max(0, y0 - 5) : y1 + 6, max(0, x0 - 5) : x1 + 6] = 0
        assert outside.max() < 1
        assert min(inside[0].max(), inside[-1].max(), inside[:, 0].max(), inside[:, -1].max()) > 30


def test_digit_keeps_its_shape():
    dark = Image.new("RGB", (100, 100))
    for strokes in load_digits().images[:20] / 16:
        image, box = draw_digit(strokes, dark, np.random.default_rng(0))
        rows, columns = np.flatnonzero(strokes.max(axis=1) > 0.4), np.flatnonzero(strokes.max(axis=0) > 0.4)
        expected = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found = image.convert("L").crop((box[0], box[1], box[2] + 1, box[3] + 1))
        found = np.asarray(found.resize(expected.shape[::-1], Image.Resampling.BOX))
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.7


def test_data_module_writes_once_and_reads(tmp_path, monkeypatch):
    options = {"train_images": 4, "val_images": 2, "preprocessing": PLAIN, "num_workers": 0}
    data = Digits(str(tmp_path), **options)
    data.prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["digits-4-2-seed0"]
    data.setup("fit")
    data.setup("test")
    assert data.classes == tuple(f"digit_{k}" for k in range(10))
    assert data.class_names == NAMES
    assert [len(data.datasets[name]) for name in ("train", "val", "test")] == [30, 10, 20]
    assert data.datasets["test"][0]["box"].shape == (4,)
    monkeypatch.setattr("gmarpp.data.digits._write", None)
    Digits(str(tmp_path), **options).prepare_data()


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gmarpp.data.digits.draw_digit", stop)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_scikit_learn_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmarpp\[demo\]'"):
        write_digits(tmp_path / "digits")


def test_no_images():
    with pytest.raises(ValueError, match=r"val_images: expected a number in \[1, 100000\], got 0"):
        write_digits(None, val_images=0)


@pytest.mark.parametrize(("option", "value"), [("train_images", 0), ("val_images", -1), ("digits_seed", -1)])
def test_options_out_of_range_are_named(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"^data: {option}: expected a number in .*, got {value}"):
        Digits(str(tmp_path), **{option: value})
