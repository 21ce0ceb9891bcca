"""A trainer that prints and logs nothing."""

import lightning as L


def quiet_trainer(folder, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**(defaults | options))
