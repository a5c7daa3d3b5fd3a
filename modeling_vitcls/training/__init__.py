"""Training: from options to a model folder with measured results.

    model.py              preset or checkpoint -> model and image processor for the labels
    trainable.py          trained parameters: full, head, last-N, LoRA
    linear_probe.py       linear probing on cached features
    losses.py             training objectives
    teacher.py            teachers for distillation, and the cache of their logits
    optimizer.py          parameter groups, learning rate, optimizer step, EMA
    loop.py               steps, evaluations, checkpoints; read this file first
    token_monitor.py      metrics of the special tokens
    costs.py              FLOPs and memory of a step, computed from the configuration
    mfu.py                FLOPs of a training step, and model FLOPs utilization
    distributed_state.py  training state as named tensors, for one process, DDP and FSDP2
    interruption.py       Ctrl-C and SIGTERM
    folder_lock.py        lock of an output folder
    output_folder.py      content of an output folder, and the files that --overwrite removes
    runner.py             output folder, checkpoints, trackers and the loop
    reporter.py           summary, progress, metrics.jsonl, trackers
    results.py            facts about a run for its summary and results.json
    branch_uploads.py     checkpoints pushed to a branch during training
    model_report.py       card, report and figures of a finished run
    finish.py             write the output folder, push it
    setup.py              fine-tuning: check options, load data and model
    components.py         fine-tuning: model, batches, loss, evaluator
    finetune.py           fine-tuning (scripts/finetune.py)
    pretrain.py           masked pre-training (scripts/pretrain.py)

Checkpoints on disk are in checkpoints.py, flags in options.py, processes and devices in distributed.py.
"""
