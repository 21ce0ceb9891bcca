"""Fine-tunes and evaluates a Vision Transformer: `python train.py fit --config configs/...`."""

from gmarpp.cli import train_main

if __name__ == "__main__":
    train_main()
