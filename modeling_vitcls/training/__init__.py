"""Training, from the options to a model folder with evaluation results.

    run.py              complete run; read this file first
    run_inputs.py       what a run reads: data and models, with the defaults that depend on them
    model.py            the model and the image processor for the labels of a dataset, and what is trained
    defaults.py         flags whose default values depend on the run
    plan.py             what a run is: frozen or with steps, and why
    summary.py          the first lines of a run: its images, its model and what it is
    frozen_run.py       a run without steps, of what is in frozen/
    steps_run.py        a run with steps, and what is measured afterwards
    run_results.py      what a run of either kind has made and measured, results.json and its last lines
    options.py          flags of the command
    teacher.py          classifier whose predictions train a distillation token
    loop.py             training loop; reporter.py prints, and signals.py stops it
    losses.py           training objectives
    optimizer.py        parameter groups, the learning rate of each step, the mean of the first and last weights
    checkpoints.py      checkpoints on disk, written completely or not at all
    distributed_state.py    the training state as named full tensors, for one process, DDP and FSDP2
    calibration.py      the temperature of the trained classifier
    new_tokens.py       what the special tokens of a run with steps hold, and what their places are worth
    statistics.py       class statistics of a model that was trained with steps
    run_folder.py       the output folder before a run: what is in it, and what is removed
    resume.py           what a resumed run takes from its start, and what it compares with it
    save.py             the output folder after a run: what is written

Outside this folder, runtime/distributed.py configures processes and devices.
"""
