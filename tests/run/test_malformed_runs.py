"""Damaged and hostile run folders: each gives what was stored, or one error that names a file of the folder."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from stored_run import run_description, shard, stored_run

from gmarpp.run.description import require_same_run
from gmarpp.run.folder import write_run
from gmarpp.run.output_folder import OutputFolder
from gmarpp.run.reader import load_explanations
from gmarpp.run.results import write_results
from gmarpp.run.shards import finished_indices, merge_parts

PATHS = [f"photos/{number}.jpg" for number in range(5)]
SECRET = b"what lies outside the folder"
VALUES = [
    None, True, [], {}, "", "../../secret", "/etc/passwd", "..", "a\0b", "x" * 5000, -1, 0, 2**70, 1e999, -0.5, [[]],
    {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A complete and an interrupted run, and a file beside them that is none of their business."""
    base = tmp_path_factory.mktemp("runs")
    stored_run(base / "complete", PATHS, shard_size=3)
    shutil.copytree(base / "complete", base / "interrupted")
    shutil.rmtree(base / "interrupted" / "maps")
    (base / "interrupted" / "parts").mkdir()
    (base / "interrupted" / "maps").mkdir()
    write_run(base / "interrupted", run_description())
    for number, indices in enumerate([[0, 3], [4, 1]]):
        part = shard(indices, [PATHS[index] for index in indices])
        part.write(base / "interrupted" / "parts" / f"00000000{number}-0.safetensors")
    return base


def use(folder):
    """Do all that reads a run folder; give what was found."""
    if json.loads((folder.parent / "kind").read_text()) == "interrupted":
        output = OutputFolder(folder, resume=True, overwrite=False)
        output.check()
        previous, finished = output.resumed()
        if previous is not None:
            require_same_run(previous, run_description(), folder)
        merge_parts(folder, 3)
        shutil.rmtree(folder / "parts")
        write_run(folder, {**(previous or run_description()), "status": "complete"})
        assert finished_indices(folder) == finished
    explanations = load_explanations(folder)
    write_results(explanations, figure_images=2)
    maps = {method: explanations.maps(method) for method in explanations.methods}
    maps |= {f"one {index}": explanations.map(index, "rollout") for index in explanations.indices}
    return {name: tensor.numpy().tobytes() for name, tensor in maps.items()}, repr(explanations.table)


def outcome(folder):
    """Give what was found, or the error; nothing outside the folder may show or change."""
    secret = folder.parent / "secret"
    names = sorted(path.name for path in folder.parent.iterdir())
    try:
        found = use(folder)
    except (ValueError, OSError) as error:
        return str(error)
    finally:
        assert secret.read_bytes() == SECRET
        assert sorted(path.name for path in folder.parent.iterdir()) == names
    report = (folder / "report.html").read_bytes()
    assert b"d2hhdCBsaWVzIG91dHNpZGUg" not in report  # its base64
    return found


def copy(runs, kind, target):
    target.mkdir()
    (target / "secret").write_bytes(SECRET)
    (target / "secret.jpg").write_bytes(SECRET)
    (target / "kind").write_text(json.dumps(kind))
    return shutil.copytree(runs / kind, target / "run")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def replace_with_pipe(path, draw):
    path.unlink()
    os.mkfifo(path)


def replace_with_folder(path, draw):
    path.unlink()
    path.mkdir()


def link_outside(path, draw):
    path.unlink()
    path.symlink_to(path.parents[1].parent / "secret" if path.parents[1].name == "run" else path.parents[1] / "secret")


def replace_with_text(path, draw):
    path.write_bytes(
        draw.choice([b"", b"[" * 100_000, b"{}", b"[]", b"\xff\xfe", b"NaN", b'{"status": "complete"}', b"0"])
    )


def change_json(content, draw):
    """Put another value, or none, at some place of a JSON value."""
    if isinstance(content, (dict, list)) and content and draw.random() < 0.75:
        key = draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if draw.random() < 0.2:
            del content[key]
        else:
            content[key] = change_json(content[key], draw)
        return content
    return draw.choice(VALUES)


def change_value(path, draw):
    """Change a JSON file or the JSON in a shard's header and leave out the digest, as an attacker would."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        content.pop("sha256")
        path.write_text(json.dumps(change_json(content, draw)))
        return
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["explanations"])
    about.pop("sha256")
    if draw.random() < 0.5:
        row = draw.choice(about["rows"])
        row[draw.choice(list(row))] = draw.choice(VALUES)
    else:
        about = change_json(about, draw)
    header["__metadata__"]["explanations"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def change_header(path, draw):
    """Change what a shard says of its tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    if not size:
        return change_value(path, draw)
    text = json.dumps(change_json(json.loads(data[8 : 8 + size]), draw)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return None


DAMAGES = [
    flip, truncate, change_value, change_header, replace_with_text, replace_with_pipe, replace_with_folder, link_outside
]  # fmt: skip


def survey(runs, folder, rounds, seed=0):
    """Damage copies of both runs; give the outcomes by kind of damage."""
    draw = random.Random(seed)
    expected = {kind: outcome(copy(runs, kind, folder / kind)) for kind in ("complete", "interrupted")}
    outcomes = {}
    for number in range(rounds):
        kind, damage = draw.choice(["complete", "interrupted"]), DAMAGES[number % len(DAMAGES)]
        run = copy(runs, kind, folder / str(number))
        file = draw.choice(files_of(run))
        damage(file, draw)
        found = outcome(run)
        same = found == expected[kind]
        assert not isinstance(found, str) or (f"{number}/run" in found and len(found) < 1500), found
        outcomes.setdefault(damage.__name__, []).append((str(file.relative_to(run)), same, found))
        # Only damage that carries no digest, as old or forged files, may go unseen, as long as it fits the rest.
        assert damage in (change_value, change_header) or same or isinstance(found, str), (damage, file)
        shutil.rmtree(folder / str(number))
    return outcomes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_damaged_runs_end_in_what_was_stored_or_in_an_error_that_names_the_folder(runs, tmp_path):
    outcomes = survey(runs, tmp_path, 32)
    assert sum(isinstance(found, str) for each in outcomes.values() for _, _, found in each) >= 20


@pytest.mark.parametrize("byte", range(0, 100, 7))
def test_no_bit_of_maps_may_flip(runs, tmp_path, byte):
    run = copy(runs, "complete", tmp_path / "case")
    path = run / "maps" / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1 - byte * len(data) // 300] ^= 16
    path.write_bytes(data)
    explanations = load_explanations(run)
    for read in (
        lambda: explanations.map(0, "rollout"),
        lambda: explanations.maps("rollout"),
        lambda: explanations.rows,
    ):
        with pytest.raises(ValueError, match=r"00000\.safetensors is damaged \(.*digest.*delete it and run again"):
            read()


@pytest.mark.parametrize(
    "file", ["../../secret", "/etc/passwd", "000000-../secret", "..", "000000-a\0", "000001-other"]
)
def test_a_part_of_somebody_else_names_no_file_outside(runs, tmp_path, file):
    run = copy(runs, "interrupted", tmp_path / "case")
    part = shard([2], [PATHS[2]])
    forged = replace(part, rows=[{**part.rows[0], "file": file}])
    forged.write(run / "parts" / "000000009-0.safetensors")
    with pytest.raises(ValueError, match=r"000000009-0\.safetensors is damaged \(rows\[0\]\.file: expected"):
        OutputFolder(run, resume=True, overwrite=False).resumed()


def test_parts_of_another_run_are_named(runs, tmp_path):
    run = copy(runs, "interrupted", tmp_path / "case")
    shard([2], [PATHS[2]], grid=(2, 2)).write(run / "parts" / "000000009-0.safetensors")
    with pytest.raises(ValueError, match=r"000000009-0\.safetensors.*not those of the run's other files"):
        OutputFolder(run, resume=True, overwrite=False).resumed()


def test_tensors_of_another_type_are_named(runs, tmp_path):
    run = copy(runs, "interrupted", tmp_path / "case")
    part = shard([2], [PATHS[2]])
    tensors = {**part.tensors, "fractions": part.fractions, "index": torch.tensor([2])}
    tensors["rollout"] = tensors["rollout"].bfloat16()
    about = {"methods": part.methods, "metrics": part.metrics, "rows": part.rows, "sha256": "00"}
    path = run / "parts" / "000000009-0.safetensors"
    save_file(tensors, path, metadata={"explanations": json.dumps(about)})
    with pytest.raises(ValueError, match=r"000000009-0\.safetensors is damaged \(expected tensors of float32"):
        OutputFolder(run, resume=True, overwrite=False).resumed()


def test_runs_without_digests_are_read(runs, tmp_path):
    run = copy(runs, "complete", tmp_path / "case")
    expected = load_explanations(run).maps("rollout")
    for path in files_of(run):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("sha256")
            path.write_text(json.dumps(content))
        else:
            data = path.read_bytes()
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            about = json.loads(header["__metadata__"]["explanations"])
            about.pop("sha256")
            header["__metadata__"]["explanations"] = json.dumps(about)
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert load_explanations(run).maps("rollout").equal(expected)
