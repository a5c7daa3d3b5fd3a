"""Faster modules with the outputs of plain PyTorch up to rounding errors. Models are plain when they are built.

    use_fast_modules(model)     replaces the layers' modules in place (lean_layers.py); the commands
                                and `Predictor` call it
    use_plain_modules(model)    undoes it (cpu_kernels.py)

cpu_kernels.py   modules for CPUs, and all private names of PyTorch that the package uses
lean_layers.py   layers that leave out Python, on any device
fast_images.py   the pixels of one image, without the overhead of transformers
"""
