"""Training: from options to a model folder with measured results.

    model.py              preset or checkpoint -> model and image processor for the labels
    trainable.py          full, head, last-N, LoRA
    linear_probe.py       train heads on cached features
    losses.py             training objectives
    teacher.py            teachers for distillation, and the cache of their outputs
    optimizer.py          AdamW's parameter groups, learning rate, optimizer step, EMA
    loop.py               steps, evaluations, checkpoints: read this first
    token_monitor.py      whether the special tokens learn
    costs.py              FLOPs and bytes of a step, counted from the configuration
    mfu.py                FLOPs of a step and model FLOPs utilization
    distributed_state.py  training state as named tensors, for one process, DDP and FSDP2
    interruption.py       Ctrl-C and SIGTERM
    folder_lock.py        one run at a time in an output folder
    output_folder.py      what an output folder holds, and what --overwrite removes
    runner.py             output folder, checkpoints, trackers and the loop
    reporter.py           summary, progress, metrics.jsonl, trackers
    results.py            what is printed and recorded about a run
    branch_uploads.py     checkpoints pushed to a branch during training
    model_report.py       card, report and figures of a finished run
    finish.py             write the output folder, push it
    setup.py              fine-tuning: options checked, data and model loaded
    components.py         fine-tuning: model, batches, loss, evaluator
    finetune.py           the program scripts/finetune.py
    pretrain.py           the program scripts/pretrain.py

Checkpoints on disk are in checkpoints.py, flags in options.py, processes and devices in distributed.py.
"""
