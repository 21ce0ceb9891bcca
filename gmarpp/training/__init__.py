"""Fine-tuning: the Lightning module, its optimizer, its trainer, and how checkpoints are written."""
