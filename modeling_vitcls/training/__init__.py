"""Training: from a data set to a model folder with its measured results.

    options.py       what can be asked for: the command line's flags as dataclasses
    data.py          digits, image folders, CSV, Parquet, Hub data sets -> pictures, labels, a held-out part
    augmentation.py  random changes of training pictures
    batches.py       which picture comes in which batch, on which process
    model.py         a preset or a checkpoint -> model and image processor for these labels
    optimisation.py  AdamW's parameter groups, the learning rate at each step
    losses.py        what it minimises
    loop.py          the training loop
    evaluation.py    metrics over every image exactly once
    movement.py      how far each special token moved
    reporting.py     what is printed and written while training
    environment.py   processes, device, versions
    finetune.py      all of it, in order; writes the output folder

Nothing here ships to the Hub.
"""
