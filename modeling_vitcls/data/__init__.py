"""Datasets, from `--dataset` to batches of images and labels.

The files in this folder are not pushed to the Hub.

options.py                                   flags of a dataset and its held-out images
sources.py, image_folder.py, in_memory.py    datasets -> splits by name
streaming.py                                 datasets that are read during training
splits.py, held_out.py                       training split, held-out split, and their fingerprints
evaluated_images.py                          images that an evaluation reads, without those of the training
images.py, labels.py                         images decoded on demand; kinds of labels
label_matching.py                            labels of a dataset as labels of a model, by name
aspect_ratio.py                              from any aspect ratio to the input of the model
sampling.py, augmentation.py, batches.py     batches, as a function of the seed and the step
"""
