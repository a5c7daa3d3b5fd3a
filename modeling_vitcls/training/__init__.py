"""Training: from options to a model folder with measured results.

    task.py               a run from top to bottom, for fine-tuning and pre-training; read this file first
    finetune.py           fine-tuning (scripts/finetune.py): data, model, loss, evaluator, card
    pretrain.py           masked pre-training (scripts/pretrain.py): the same parts
    runner.py             output folder, checkpoints and trackers around the loop
    loop.py               steps, evaluations, checkpoints, Ctrl-C and SIGTERM
    model.py              preset or checkpoint -> model and image processor; the trained parameters
    linear_probe.py       linear probing on cached features
    losses.py             training objectives
    teacher.py            teachers for distillation, and the cache of their logits
    optimizer.py          parameter groups, learning rate, optimizer step, EMA
    token_monitor.py      metrics of the special tokens
    costs.py              FLOPs and memory of a step, computed from the configuration
    mfu.py                FLOPs of a training step, and model FLOPs utilization
    distributed_state.py  training state as named tensors, for one process, DDP and FSDP2
    output_folder.py      content of an output folder, the files that --overwrite removes, and the lock
    reporter.py           summary, progress, metrics.jsonl, trackers, facts for results.json
    branch_uploads.py     checkpoints pushed to a branch during training
    model_report.py       card, report and figures of a finished run

Checkpoints on disk are in checkpoints.py, flags in options.py, processes and devices in distributed.py.
"""
