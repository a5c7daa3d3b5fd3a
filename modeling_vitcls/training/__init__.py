"""Training: from a data set to a model folder with its measured results. Nothing here ships to the Hub.

    options.py            what can be asked for: the command line's flags as dataclasses

Data: --dataset -> pictures and labels, a held-out part -> batches
    data.py               a training part and a held-out part; ../data/held_out.py: how one is chosen
    sources.py            digits, folders, CSV, Parquet, MNIST's files, the Hub; streaming.py: read while training
    columns.py, labels.py which columns hold images and labels; what labels are
    pictures.py, broken.py  pictures decoded when asked for; those that cannot be
    batches.py            which picture comes in which batch, on which process; ordering.py, seeds.py, workers.py
    augmentation.py       random changes of training pictures

Model and loss
    model.py              a preset or a checkpoint -> model and image processor for these labels
    trainable.py          full, head, last-N, LoRA; probe.py: heads alone, on features computed once
    losses.py             what the loop minimises; distillation.py, teacher.py, teacher_cache.py
    masking.py            which patches masked pre-training hides

The loop
    loop.py               steps, evaluations, checkpoints: read this first
    optimisation.py       AdamW's parameter groups, the learning rate at each step; ema.py
    updates.py, zero.py   one optimiser step, by PyTorch or DeepSpeed; what DeepSpeed has to be told
    health.py             whether the special tokens learn
    checkpoints.py        checkpoints on disk; states.py: what is in them, on several processes
    interruption.py       Ctrl-C and SIGTERM
    session.py            the loop in its output folder, for fine-tuning and pre-training
    output_folder.py      what a run may replace in its output folder; folder_lock.py: one run at a time
    branch_uploads.py     checkpoints pushed to a branch while it trains; saving.py: the model folder
    environment.py        processes, device, versions
    memory.py             what tensors on CPUs free is kept for the next ones
    reporting.py, results.py  what is printed and written
    utilisation.py        what a step costs, and how much of the machine's speed that makes use of

What the scripts call
    run.py, parts.py, finetune.py        fine-tuning: prepared, put together, done; output.py: how runs end
    pretrain.py, reconstruction.py       masked image modelling, and its evaluation
    evaluate.py, evaluation.py, metrics.py   a saved model; a model in training; what is measured
    prediction.py, prediction_*.py       predictions and features of any number of images
"""
