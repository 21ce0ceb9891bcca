import json
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image
from test_targets import TEXT, VISION

EXAMPLE = Path(__file__).parents[2] / "examples/clip.py"
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "c", "d", "a", "t</w>", "o", "g</w>"]


@pytest.fixture
def folder(tmp_path):
    """A small CLIP as it is on the Hub."""
    text = TEXT | {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=40)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    size = {"height": 32, "width": 32}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_the_example_draws_a_photograph_for_two_texts(folder, monkeypatch, capsys):
    Image.radial_gradient("L").convert("RGB").save(folder / "photograph.png")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["clip.py", "photograph.png", str(folder), "a cat", "a dog"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "'a cat': " in capsys.readouterr().out
    assert Image.open("texts.png").width > 300
