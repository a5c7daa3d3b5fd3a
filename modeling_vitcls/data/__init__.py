"""Datasets: from --dataset to batches of images and labels.

    sources.py       digits, folders, CSV, Parquet, MNIST's files, the Hub -> splits by name
    image_folder.py  folders of images
    labels.py        columns of images and labels; single label, multi-label, multi-task
    images.py        images decoded on demand; unreadable images
    held_out.py      held-out images of datasets without an evaluation split, and their record in results.json
    streaming.py     datasets that are read during training
    splits.py        training split and held-out split; fingerprints, which `--resume` compares
    augmentation.py  random changes of training images, and masks for masked image modeling
    sampling.py      images of each batch, as a function of the seed and the step
    batches.py       batches, loaded and augmented in workers

Nothing here is copied to the Hub.
"""
