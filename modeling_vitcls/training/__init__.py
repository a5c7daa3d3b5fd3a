"""Training, from the options to a model folder with evaluation results.

    task.py             complete run of fine-tuning or pre-training; read this file first
    finetune.py         data, model, loss, evaluator and card of fine-tuning
    pretrain.py         data, model, loss, evaluator and card of masked pre-training
    runner.py           output folder, checkpoints, signals and trackers for the training loop
    loop.py             training loop
    output_folder.py    checks of the output folder, removal of replaced files, lock of the folder

Outside this folder, checkpoints.py writes and reads checkpoints, options.py defines the flags, and distributed.py
configures processes and devices.
"""
