"""Datasets: from --dataset to batches of images and labels.

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
    fingerprint.py   fingerprints of training data: `--resume` continues only on the same data
    held_out.py      held-out images of datasets without an evaluation split, and their record in results.json

Nothing here is copied to the Hub.
"""
