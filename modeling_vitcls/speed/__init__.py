"""Faster modules with the outputs of plain PyTorch up to rounding errors. Models are plain when they are built.

    pack(model)     an object for reading (packed.py), which the commands and `Predictor` run

cpu_kernels.py   modules for CPUs, and all private names of PyTorch that the package uses
packed.py        models that are only read: joined, cast and reordered weights
fast_images.py   the pixels of one image, without the overhead of transformers
"""
