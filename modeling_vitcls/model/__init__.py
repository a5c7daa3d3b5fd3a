# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The files that travel with every checkpoint, in reading order.

They import only one another and public libraries.

    configuration_vitcls.py           the fields of a model, and their checks
    token_layout_vitcls.py            the kinds of tokens, and where each is in the sequence
    blocks_vitcls.py                  the ViT in plain PyTorch: embeddings, attention, MLP, layer
    modeling_vitcls.py                output classes, encoder, task classes
    heads_vitcls.py                   poolers, classifiers, pixel decoder, losses, class statistics
    (a forward pass of a default model runs these five files, and one function of positions_vitcls.py)

    field_checks_vitcls.py            checks of fields, files and checkpoints, one-line errors
    positions_vitcls.py               rotary position embeddings, resampling
    attention_masks_vitcls.py         masks of CLS tokens, position bias, fading in, attention maps
    adaptation_vitcls.py              checkpoints with other special tokens or sizes
    image_processing_vitcls.py        image processors with two backends, and pipelines that use them

A checkpoint contains all files of this folder. transformers copies the files next to the weights,
so they import each other in the form `from .blocks_vitcls import ViTCLSAttention`, and nothing else
of this package.
"""
