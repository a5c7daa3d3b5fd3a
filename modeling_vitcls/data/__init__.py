"""From --dataset to batches of images and labels.

    sources.py       digits, folders, CSV, Parquet, MNIST's files, the Hub -> splits by name
    columns.py       columns of images and labels
    labels.py        label spaces: single label, multi-label, multi-task
    images.py        images decoded on demand; unreadable images
    image_folder.py  folders of images
    splits.py        training split and held-out split
    streaming.py     datasets that are read during training
    augmentation.py  random changes of training images
    masking.py       patches that masked image modeling hides
    random_bits.py   random numbers as functions of the seed and their purpose
    ordering.py      order of the images in each epoch
    workers.py       DataLoader workers
    batches.py       images of each batch, on each process
    fingerprint.py   Fingerprints of training data: `--resume` continues only on the data that the run was started with
    held_out.py  Which images are held out if a data set has no split for evaluation, and what a run records about them

Nothing here is copied to the Hub.
"""
