"""Training: from options to a model folder with measured results.

    task.py               a run from top to bottom, for fine-tuning and pre-training; read this file first
    finetune.py           fine-tuning: data, model, loss, evaluator, card
    pretrain.py           the same parts for masked pre-training
    runner.py, loop.py    output folder, checkpoints and trackers around the steps
    output_folder.py      files that a run may replace, and the lock

Each other file contains one part of a run. Checkpoints on disk are in checkpoints.py, flags in options.py, processes
and devices in distributed.py.
"""
