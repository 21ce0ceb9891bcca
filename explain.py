"""Explains images with a trained Vision Transformer: `python explain.py predict --ckpt_path ...`."""

from gmarpp.cli import explain_main

if __name__ == "__main__":
    explain_main()
