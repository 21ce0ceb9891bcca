import csv
import math

import pandas
import pytest
from PIL import Image
from stored_run import stored_run

from gmarpp.run import shards
from gmarpp.run.results import write_results
from gmarpp.run.tables import write_csv

PATHS = [
    "a/same.jpg",
    "b/same.jpg",
    'q"uote, <b>&.jpg',
    "new\nline.jpg",
    "猫.jpg",
    "x" * 300,
    "bad\udcff.jpg",
    "a\rb.jpg",
]


@pytest.fixture
def explanations(tmp_path):
    return stored_run(tmp_path / "run", PATHS)


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_give_back_paths_and_values(explanations):
    write_results(explanations, figure_images=0, report=False)
    table = read_table(explanations.folder / "explanations.csv")
    paths = [path.replace("\udcff", r"\udcff") for path in PATHS]
    assert [row["path"] for row in table[::3]] == paths
    # pandas counts a carriage return in quotes as a line feed
    frame = pandas.read_csv(explanations.folder / "explanations.csv")
    assert frame["path"][::3].tolist() == paths
    assert frame["index"][::3].tolist() == list(range(len(PATHS)))
    assert b"\r\n" not in (explanations.folder / "explanations.csv").read_bytes()
    assert [row["image"] for row in table[:4:3]] == ["images/000000-same.jpg", "images/000001-same.jpg"]
    assert [row["method"] for row in table[:3]] == ["gmarpp_l1", "rollout", "random"]
    assert table[3]["average_drop"] == ""
    expected = explanations.values["rollout"]["insertion_auc"][2]
    assert float(table[7]["insertion_auc"]) == pytest.approx(expected, rel=1e-5)
    assert len(table[7]["insertion_auc"]) <= 9
    summary = read_table(explanations.folder / "summary.csv")
    assert list(summary[0]) == ["method", "metric", "mean", "low", "high", "n"]
    assert (summary[0]["n"], summary[1]["n"]) == ("7", "8")
    mean = explanations.values["gmarpp_l1"]["insertion_auc"].mean()
    assert float(summary[1]["mean"]) == pytest.approx(mean, rel=1e-5)
    assert float(summary[1]["low"]) < mean < float(summary[1]["high"])
    assert not (explanations.folder / "comparison.png").exists()
    assert not (explanations.folder / "report.html").exists()


def test_the_first_metric_of_the_summary_leaves_the_undefined_image_out(explanations):
    values = [v for v in explanations.values["rollout"]["average_drop"].tolist() if not math.isnan(v)]
    (row,) = [r for r in explanations.summary if (r["method"], r["metric"]) == ("rollout", "average_drop")]
    assert row["mean"] == pytest.approx(sum(values) / 7)


def test_figures_in_all_formats(explanations):
    write_results(explanations, figure_images=3, figure_formats=("png", "svg"), report=False)
    with Image.open(explanations.folder / "comparison.png") as figure:
        assert figure.width > figure.height / 2
    assert "<svg" in (explanations.folder / "comparison.svg").read_text()
    assert (explanations.folder / "curves.png").exists()
    assert (explanations.folder / "curves.svg").exists()


def test_all_results_come_from_one_reading_of_each_file(explanations, monkeypatch):
    opened, safe_open = [], shards.safe_open
    monkeypatch.setattr(shards, "safe_open", lambda path, *rest: opened.append(path.name) or safe_open(path, *rest))
    write_results(explanations, figure_images=3)
    assert opened == ["00000.safetensors", "00001.safetensors"]
    for name in ("explanations.csv", "summary.csv", "comparison.png", "curves.png", "report.html"):
        assert (explanations.folder / name).stat().st_size
    assert len(explanations.rows) == len(explanations.values["rollout"]["sparseness"]) == len(PATHS)
    assert len(opened) == 2, "what has been read is known"


def test_numbers_have_six_digits_and_none_is_empty(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": None, "c": float("nan"), "d": 12, "e": -0.5, "f": -3}])
    assert (tmp_path / "x.csv").read_text() == "a,b,c,d,e,f\n0.333333,,,12,-0.5,-3\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_text_is_no_formula(tmp_path, start):
    write_csv(tmp_path / "x.csv", [{f"{start}name": f"{start}HYPERLINK(1,2)", "b": f"a{start}", "c": -1.5}])
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            [f"'{start}name", "b", "c"],
            [f"'{start}HYPERLINK(1,2)", f"a{start}", "-1.5"],
        ]
