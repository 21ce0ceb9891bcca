import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import torch
from stored_run import CLASS_NAMES, METHODS, METRICS, stored_run

from gmarpp.colormaps import diverging_table
from gmarpp.maps import normalize_map
from gmarpp.run import report, report_maps
from gmarpp.run.results import write_results
from gmarpp.visualize import MapStyle, overlay

PATHS = ["a/same.jpg", "b/same.jpg", "</script><script>alert(1)</script>.jpg", "bad\udcff&.jpg", "x" * 300, "猫.jpg"]


# Uses the page as people do and leaves what it saw in an element of the document.
VISITOR = """<script>
addEventListener("load", () => {
  const seen = {}, find = selector => document.querySelector(selector);
  const all = selector => [...document.querySelectorAll(selector)], style = node => getComputedStyle(node);
  const focused = () => document.activeElement.textContent;
  const set = (field, value) => {
    field.value = value;
    for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, { bubbles: true }));
  };
  const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const choose = fields => {
    for (const [id, value] of Object.entries(fields)) set(document.getElementById(id), value);
    const paths = all("#gallery .item").map(item => item.title), paged = !find(".pages.below").hidden;
    const result = { status: find("#status").textContent, paths, paged };
    find(".pages button").click();
    return result;
  };
  seen.title = [document.title, find("h1").textContent];
  const marks = all(".chart").map(chart => [...chart.querySelectorAll("text")]);
  seen.axes = marks.map(texts => texts.map(text => text.textContent));
  // In the units of the view box, of which everything left of 0 is cut; the text is larger on small screens.
  for (const text of marks.flat()) text.style.fontSize = "15px";
  const within = (node, left, top, right, bottom) => {
    const box = node.getBBox();
    return box.x >= left && box.y >= top && box.x + box.width <= right && box.y + box.height <= bottom;
  };
  seen.cut = marks.flat().filter(text => !within(text, 0, 0, 460, 250)).length;
  seen.outside = all(".chart path").filter(path => !within(path, 0, 13.9, 460, 220.1)).length;
  seen.note = find("#summary .note").textContent.slice(0, 4);
  seen.sections = all("nav a").map(link => link.textContent);
  const pixel = canvas => canvas.getContext("2d").getImageData(64, 64, 1, 1).data;
  seen.drawn = all("#gallery canvas").every(canvas => pixel(canvas)[3] === 255);
  find(".pages.below button:last-child").click();
  seen.last = { status: find("#status").textContent, focused: focused() };
  seen.dog = choose({ class: 1 });
  seen.wrong = choose({ correctness: "wrong" });
  seen.sorted = choose({ sort: "metric:insertion_auc", "sort-method": 1 });
  seen.bounded = choose({ least: 0.25, most: 0.75 });
  seen.cleared = choose({ sort: "index" }).status;
  set(find(".opacity"), 80);
  seen.opacity = [find(".opacity + output").textContent, ...all("#gallery canvas").map(node => style(node).opacity)];
  find(".summary thead button").click();
  seen.ordered = all("#summary th[aria-sort]").map(header => [header.ariaSort, style(header).boxShadow !== "none"]);
  const legend = find(".legend button");
  legend.focus();
  seen.emphasis = all(".chart.dim .line.on").length;
  legend.blur();
  seen.emphasis -= all(".chart.dim").length;
  const shown = () => all("#gallery .item").map(item => item.title);
  all(".legend")[1].querySelector("button").click();
  seen.curve = [find("#sort").value, find("#sort-method").value, shown()];
  all(".hit")[0].dispatchEvent(new Event("click"));
  seen.line = [find("#sort").value, find("#sort-method").value, shown()];
  set(find("#class-method"), 1);
  seen.classes = all("#classes tbody tr").map(row => [...row.children].map(cell => cell.textContent));
  find("#classes tbody button").click();
  seen.class = [find("#class").value, find("#status").textContent];
  choose({ class: "", sort: "index" });
  find("#direction").ariaPressed === "true" && find("#direction").click();
  const title = () => find("#detail header p").textContent.split(" · ")[1];
  const next = () => find("[aria-label='Next image']");
  find("#gallery .item").focus();
  find("#gallery .item").click();
  seen.opened = [find("#detail").open, title(), find("#detail .opacity").value, all("#detail canvas").length];
  const tile = find("#detail .big figure:nth-child(3) .tile"), box = tile.getBoundingClientRect();
  // The middle of the patch in the third of four rows and the second of six columns.
  const at = { clientX: box.left + 1.5 * box.width / 6, clientY: box.top + 2.5 * box.height / 4, bubbles: true };
  tile.dispatchEvent(new PointerEvent("pointermove", at));
  const { left: across, top: down } = find(".patch").style;
  seen.patch = [all("#detail figcaption output").map(node => node.textContent), across, down];
  find("#detail").dispatchEvent(new PointerEvent("pointerleave"));
  seen.left = [all(".patch").length, find("#detail figcaption output").textContent];
  set(find("#detail .split"), 30);
  const left = find("#detail img.left");
  seen.split = [style(find("#detail canvas")).clipPath, style(left).clipPath, style(left).filter];
  press("ArrowRight");
  seen.kept = style(find("#detail canvas")).clipPath;
  next().click();
  seen.moved = [title(), focused()];
  while (!next().disabled) press("ArrowRight");
  seen.end = [title(), focused()];
  press("ArrowRight");
  press("ArrowLeft");
  seen.back = [title(), focused()];
  find("#detail .close").click();
  press("ArrowLeft");
  seen.closed = [find("#detail").open, document.activeElement.className];
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
});
</script>"""


class Scripts(HTMLParser):
    """Texts of the script elements by id, and every address the page refers to."""

    def __init__(self):
        super().__init__()
        self.scripts, self.addresses, self.opened = {}, [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "script":
            self.opened = attributes.get("id", "code")
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]

    def handle_data(self, data):
        if self.opened is not None:
            self.scripts[self.opened] = self.scripts.get(self.opened, "") + data

    def handle_endtag(self, tag):
        self.opened = None


def parse(page):
    parser = Scripts()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser, json.loads(parser.scripts["data"])


@pytest.fixture
def explanations(tmp_path):
    return stored_run(tmp_path / "run", PATHS)


@pytest.fixture
def page(explanations):
    write_results(explanations, figure_images=0)
    return explanations.folder / "report.html"


def test_no_text_of_the_data_can_leave_its_element(page):
    parser, data = parse(page)
    assert set(parser.scripts) == {"data", "maps-0", "code"}
    assert data["images"]["path"] == [path.replace("\udcff", "?") for path in PATHS]
    assert set(data["images"]["classNames"].values()) == set(CLASS_NAMES)
    assert "<b>dog" not in page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page.read_text(encoding="utf-8")
    assert "innerHTML" not in parser.scripts["code"]


def test_the_page_needs_no_network(page):
    parser, _ = parse(page)
    assert [address for address in parser.addresses if not address.startswith("#")] == []
    addresses = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", page.read_text(encoding="utf-8"))
    assert set(addresses) <= {"http://www.w3.org"}
    assert "default-src 'none'" in page.read_text(encoding="utf-8")


def test_maps_are_bytes_in_the_order_of_images_and_methods(page, explanations):
    parser, data = parse(page)
    assert data["grid"] == [4, 6]
    assert data["size"] == [24, 36]
    decoded = np.frombuffer(base64.b64decode(json.loads(parser.scripts["maps-0"])), dtype=np.uint8)
    maps = decoded.reshape(len(PATHS), len(METHODS), 4, 6)
    expected = normalize_map(explanations.map(4, "rollout")) * 255
    assert np.abs(maps[4, 1] - expected).max() <= 0.5


def test_signed_maps_are_bytes_around_their_zero(tmp_path):
    explanations = stored_run(tmp_path / "run", PATHS, signed_methods=["rollout"])
    write_results(explanations, figure_images=0, style=MapStyle("viridis", 0.75, "positive"))
    parser, data = parse(explanations.folder / "report.html")
    decoded = np.frombuffer(base64.b64decode(json.loads(parser.scripts["maps-0"])), dtype=np.uint8)
    found = decoded.reshape(len(PATHS), len(METHODS), 4, 6)[4, 1]
    values = explanations.map(4, "rollout").numpy()
    assert values.min() < 0
    assert np.abs(found - (128 + 127 * values / np.abs(values).max())).max() <= 0.5
    assert [method["signed"] for method in data["methods"]] == [False, True, False]
    assert (data["colormap"], data["opacity"], data["signedMaps"]) == ("viridis", 0.75, "positive")
    colors = np.frombuffer(base64.b64decode(data["diverging"]), dtype=np.uint8).reshape(256, 4)
    assert (colors[:, :3] == diverging_table()).all()
    assert colors[[1, 64, 128, 192, 255], 3].tolist() == [255, 255, 0, 255, 255]


def test_a_page_without_signed_maps_does_not_speak_of_them(page):
    _, data = parse(page)
    assert data["diverging"] is None
    assert not any(method["signed"] for method in data["methods"])


def test_values_intervals_and_leaders(page, explanations):
    _, data = parse(page)
    assert [metric["higher"] for metric in data["metrics"]] == [False, True, None]
    values = explanations.values["rollout"]["average_drop"]
    assert data["images"]["values"]["rollout"]["average_drop"][1] is None
    sent = np.array(data["images"]["values"]["rollout"]["average_drop"][2:])
    assert (sent.astype(np.float32) == values[2:]).all(), "the page alone rounds"
    mean, low, high, n = data["summary"]["rollout"]["average_drop"]
    assert mean == pytest.approx(float(np.nanmean(values)), rel=1e-3)
    assert low <= mean <= high
    assert n == len(PATHS) - 1
    assert data["leaders"] == {metric: [] for metric in METRICS}, "six images tell no methods apart"
    assert data["curves"]["insertion"]["rollout"]["fractions"] == [0, 0.25, 0.5, 0.75, 1]
    assert data["images"]["label"][0] == -1


def test_the_title_says_what_was_explained(explanations):
    title = report._title
    assert title(explanations.run) == "x on ImageFolder"
    run = explanations.run | {"data": {"name": "ImageFolder", "options": {"root": "../photos of cats/"}}}
    assert title(run) == "x on ImageFolder, photos of cats"
    run = run | {"checkpoint": {"path": None}, "data": {"name": None}}
    assert title(run) == "vit_tiny on data loader"


def test_disagreement_is_that_of_the_two_methods_beside_the_control(page, explanations):
    _, data = parse(page)
    first, second = (explanations.maps(method).flatten(1).numpy() for method in ("gmarpp_l1", "rollout"))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert data["images"]["weakest"] == pytest.approx(expected, abs=1e-3)
    assert data["images"]["weakestPair"] == [[0, 1]] * len(PATHS)
    assert data["images"]["agreement"][0][1] == pytest.approx(np.mean(expected), abs=1e-3)
    assert data["images"]["agreement"][2][2] == 1


def test_pictures_and_maps_of_a_large_run_stay_in_files(explanations, monkeypatch):
    monkeypatch.setattr(report, "_EMBEDDED_IMAGES", 0)
    monkeypatch.setattr(report_maps, "_EMBEDDED_BYTES", 0)
    monkeypatch.setattr(report_maps, "_CHUNK_BYTES", 4 * len(METHODS) * 24)
    write_results(explanations, figure_images=0)
    parser, data = parse(explanations.folder / "report.html")
    assert set(parser.scripts) == {"data", "code"}
    assert data["thumbnails"] is None
    assert data["mapFiles"] == ["report_maps/00000.js", "report_maps/00001.js"]
    script = (explanations.folder / data["mapFiles"][1]).read_text()
    encoded = re.fullmatch(r'receiveMaps\(1,"([A-Za-z0-9+/=]*)"\)\n', script)[1]
    assert len(base64.b64decode(encoded)) == 2 * len(METHODS) * 24


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("embedded", [True, False])
def test_a_visitor_finds_what_the_page_promises(tmp_path, monkeypatch, embedded):
    if not embedded:
        monkeypatch.setattr(report, "_EMBEDDED_IMAGES", 0)
        monkeypatch.setattr(report_maps, "_EMBEDDED_BYTES", 0)
        monkeypatch.setattr(report_maps, "_CHUNK_BYTES", 20 * len(METHODS) * 24)
    explanations = stored_run(tmp_path / "run", [*PATHS, *(f"{number}.jpg" for number in range(44))])
    page = explanations.folder / "report.html"
    write_results(explanations, figure_images=0)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", VISITOR + "</body>"), encoding="utf-8")
    document = browse(page)
    assert "&lt;b&gt;dog&lt;/b&gt;" in document
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', document)[1]))
    rows = explanations.rows
    paths = [row["path"].replace("\udcff", "?") for row in rows]

    def found(indices):
        status = f"1\u2013{len(indices)} of {len(indices)} images"
        return {"status": status, "paths": [paths[index] for index in indices], "paged": False}

    assert seen["sections"] == ["Summary", "Curves", "Agreement", "Classes", "Highlights", "Gallery", "Run"]
    assert seen["title"] == ["x on ImageFolder · explanations", "x on ImageFolder"]
    steps = ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert seen["axes"] == [[*steps, "0 %", "25 %", "50 %", "75 %", "100 %"]] * 2
    assert (seen["cut"], seen["outside"], seen["note"]) == (0, 0, "Best")
    assert seen["drawn"]
    assert seen["last"] == {"status": "49\u201350 of 50 images", "focused": "← Previous"}
    assert seen["dog"] == found([row["index"] for row in rows if row["target"] == 1])
    wrong = [row["index"] for row in rows if row["label"] not in (-1, row["predicted"])]
    assert seen["wrong"] == found(wrong)
    values = explanations.values["rollout"]["insertion_auc"].tolist()
    ranked = sorted(range(50), key=lambda index: values[index])
    assert seen["sorted"]["paged"]
    assert seen["sorted"]["paths"] == [paths[index] for index in ranked[:48]]
    assert seen["bounded"] == found([index for index in ranked if 0.25 <= values[index] <= 0.75])
    assert seen["cleared"] == "1\u201348 of 50 images"
    assert set(seen["opacity"]) == {"80 %", "0.8"}
    assert seen["ordered"] == [["ascending", True]]
    assert seen["emphasis"] == 1
    deletion = explanations.mean_curves()[1]
    first = min(METHODS, key=lambda method: deletion[method].auc)
    assert seen["curve"] == ["index", str(METHODS.index(first)), paths[:48]], "there is no deletion_auc to sort by"
    by_area = explanations.values["gmarpp_l1"]["insertion_auc"].tolist()
    assert seen["line"][:2] == ["metric:insertion_auc", "0"]
    assert seen["line"][2] == [paths[index] for index in sorted(range(50), key=lambda index: -by_area[index])][:48]
    assert seen["classes"] == classes_by_hand(rows, explanations.values["rollout"])
    assert seen["class"] == ["3", "1\u201313 of 13 images"]
    shades = np.rint(255 * normalize_map(explanations.map(0, "rollout")))[2, 1] / 255
    other = np.rint(255 * normalize_map(explanations.map(0, "gmarpp_l1")))[2, 1] / 255
    assert seen["patch"][0][:3] == ["row 3, column 2", f"{other:.2f}", f"{shades:.2f}"]
    assert [float(edge.rstrip("%")) for edge in seen["patch"][1:]] == pytest.approx([100 / 6, 50], abs=0.01)
    assert seen["left"] == [0, ""]
    assert seen["split"] == ["inset(0px 0px 0px 30%)", "inset(0px 70% 0px 0px)", "none"]
    assert seen["kept"] == "inset(0px 0px 0px 30%)"
    assert seen["opened"] == [True, "image 0", "80", len(METHODS)]
    assert seen["moved"] == ["image 2", "→"]
    assert seen["end"] == ["image 49", "Close"]
    assert seen["back"] == ["image 48", "←"]
    assert seen["closed"] == [False, "item"]


def classes_by_hand(rows, values):
    """Rows of the table of classes: the largest first, then by name."""
    table = []
    for target in {row["target"] for row in rows}:
        members = [row for row in rows if row["target"] == target]
        known = [row["label"] == row["predicted"] for row in members if row["label"] >= 0]
        indices = [row["index"] for row in members]
        means = [float(np.nanmean(values[metric][indices])) for metric in METRICS]
        name = CLASS_NAMES[target].split(",")[0]
        texts = [
            f"{mean:.1f} %" if "average" in name else f"{mean:.3f}" for name, mean in zip(METRICS, means, strict=True)
        ]
        table.append((-len(members), name, f"{100 * sum(known) / len(known):.1f} %", texts))
    return [[name, str(-count), correct, "50.0 %", *texts] for count, name, correct, texts in sorted(table)]


# Draws the first signed map both ways and leaves what it saw in an element of the document.
PAINTER = """<script>
addEventListener("load", () => {
  const map = () => {
    const canvas = document.querySelector("#gallery canvas[data-method='1']");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [getComputedStyle(canvas).opacity, [...data]];
  };
  const words = () => document.querySelector("#gallery .scales").textContent;
  const color = node => getComputedStyle(node).color;
  const choice = document.querySelector(".signed-maps select");
  const seen = { diverging: [words(), ...map()] };
  seen.swatches = [...document.querySelectorAll("#summary .swatch")].map(node => color(node) === color(document.body));
  choice.value = "positive";
  choice.dispatchEvent(new Event("change", { bubbles: true }));
  seen.positive = [words(), ...map()];
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
});
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_the_page_draws_signed_maps_as_overlays_do(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "method_color", {"gmarpp_l1": "#d7263d", "rollout": "#1b1b1e", "random": "#8a8f98"}.get)
    explanations = stored_run(tmp_path / "run", PATHS, signed_methods=["rollout"])
    page = explanations.folder / "report.html"
    write_results(explanations, figure_images=0)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PAINTER + "</body>"), encoding="utf-8")
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', browse(page))[1]))
    assert seen["swatches"] == [False, True, False], "what is nearly black has the color of the text"
    values = explanations.map(0, "rollout")
    for choice, opacity, low in (("diverging", 0.75, "against the class"), ("positive", 0.5, "0")):
        words, css_opacity, drawn = seen[choice]
        assert words == f"Rollout: {low}for the classothers: leastmost relevant"
        assert float(css_opacity) == opacity
        pixels = np.array(drawn, dtype=float).reshape(85, 128, 4)
        cover = opacity * pixels[..., 3:] / 255
        page_picture = (1 - cover) * 102 + cover * pixels[..., :3]
        expected = overlay(torch.full((3, 85, 128), 0.4), values, signed_maps=choice)
        # The page interpolates bytes, and the browser's canvas rounds colors of small alpha.
        assert np.abs(page_picture - expected).mean() < 1.5
        assert np.abs(page_picture - expected).max() < 12


def browse(page):
    """Give the document as it is after a page was loaded in a browser."""
    switches = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    options = ["--headless=new", "--disable-sync", *(f"--{switch}" for switch in switches.split())]
    # The browser puts a socket into its profile, whose path must be short.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
