"""`gmarpp push` against a stand-in for the Hub that keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch

import gmarpp
from gmarpp.network.build import build_model
from gmarpp.network.files.save import save_weights
from gmarpp.network.preprocessing import get_preprocessing, set_preprocessing
from gmarpp.push import main


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push needs."""

    def reply(self, content, status=200, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        name = self.path.partition("/resolve/main/")[2]
        found = name in self.server.files
        headers = [("X-Repo-Commit", "0" * 40), ("ETag", '"1"')]
        self.reply({}, 200 if found else 404, headers if found else [("X-Error-Code", "EntryNotFound")])

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b"".join(self.chunks())
        self.server.asked.append(self.path)
        if self.server.refuses:
            return self.reply({"error": "no"}, 403, [("X-Error-Message", "you may not write here")])
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.reply({"url": f"{self.server.url}/me/tiny"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.reply({"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        if "/commit/" in self.path:
            self.server.commits += 1
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.reply({"commitUrl": f"{self.server.url}/me/tiny/commit/1", "commitOid": "1"})
        return self.reply({"errors": [], "warnings": []})

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.created, server.asked, server.commits, server.refuses = {}, [], [], 0, False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    # As `HF_ENDPOINT` sets them where it is there before the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def network():
    torch.manual_seed(0)
    options = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "global_pool": "avg"}
    model = build_model("vit_tiny_patch16_224", 3, 32, options).eval()
    set_preprocessing(model, {"mean": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.75})
    model.classes, model.class_names = ("n1", "n2", "n3"), ("ant", "bée", "cat")
    return model


@pytest.fixture
def checkpoint(network, tmp_path):
    save_weights(network, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def received(hub, folder):
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    return folder


def test_timm_and_gmarpp_rebuild_the_network(hub, network, checkpoint, tmp_path):
    main(["--ckpt_path", checkpoint, "--repo", "me/tiny", "--private", "true"])
    folder = received(hub, tmp_path / "received")
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}
    assert hub.commits == 1
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(images), network(images))
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["input_size"], tuple(data["mean"]), data["crop_pct"]) == ((3, 32, 32), (0.4, 0.5, 0.6), 0.75)
    ours = gmarpp.load_model(folder)
    assert torch.equal(ours(images), network(images))
    assert (ours.classes, ours.class_names) == (network.classes, network.class_names)
    assert get_preprocessing(ours) == get_preprocessing(network)
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "timm"
    assert "3 classes: ant, bée, cat." in card.text
    assert 'timm.create_model("hf-hub:me/tiny", pretrained=True)' in card.text


def test_the_card_beside_the_checkpoint_goes_along_and_an_edited_one_stays(hub, checkpoint, tmp_path):
    hub.files["README.md"] = b"edited on the Hub"
    main(["--ckpt_path", checkpoint, "--repo", "me/tiny"])
    assert hub.files["README.md"] == b"edited on the Hub"
    assert "model.safetensors" in hub.files
    (tmp_path / "vit.md").write_text("---\nlibrary_name: timm\n---\n# How it was trained\n")
    main(["--ckpt_path", checkpoint, "--repo", "me/tiny"])
    assert hub.files["README.md"].decode().startswith("---\nlibrary_name: timm\n---\n# How it was trained\n")
    (tmp_path / "mine.md").write_text("mine")
    main(["--ckpt_path", checkpoint, "--repo", "me/tiny", "--card", str(tmp_path / "mine.md")])
    assert hub.files["README.md"].startswith(b"mine\n")


def test_mistakes_end_with_one_line_and_send_nothing(hub, network, checkpoint, tmp_path, capsys):
    def failed(*arguments):
        with pytest.raises(SystemExit):
            main(list(arguments))
        return capsys.readouterr().err.splitlines()[-1]

    assert "--repo: expected owner/name, got 'tiny'" in failed("--ckpt_path", checkpoint, "--repo", "tiny")
    assert "'me/ti ny'" in failed("--ckpt_path", checkpoint, "--repo", "me/ti ny")
    assert "none.md" in failed("--ckpt_path", checkpoint, "--repo", "me/tiny", "--card", "none.md")
    assert "none.ckpt" in failed("--ckpt_path", "none.ckpt", "--repo", "me/tiny")
    network.model_args["layer_norm_eps"] = 1e-12
    save_weights(network, tmp_path / "eps.safetensors")
    assert "cannot hold layer_norm_eps" in failed("--ckpt_path", str(tmp_path / "eps.safetensors"), "--repo", "me/tiny")
    assert hub.asked == []
    hub.refuses = True
    line = failed("--ckpt_path", checkpoint, "--repo", "me/tiny")
    assert "me/tiny could not be pushed to the Hugging Face Hub" in line
    assert "hf auth login" in line
    assert hub.commits == 0
