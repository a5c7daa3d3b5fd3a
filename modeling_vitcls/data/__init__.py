"""Datasets, from `--dataset` to batches of images and labels.

The files in this folder are not pushed to the Hub.

options.py                                   flags of a dataset and its held-out images
sources.py, image_folder.py, in_memory.py    datasets -> tables of splits by name
dataset.py                                   a dataset is a value with steps: read, join, answer, identify
folder_layout.py                             folders of splits and of classes, by their names
class_folders.py                             folders that are no classes: left out, asked about, refused
tables.py, columns.py                        tables as text; their columns: images, labels, splits
groups.py, copies.py                         groups of images, in columns or folders; copies with two labels
cells.py, labels.py                          cells -> names of labels -> indices
answers.py                                   labels that a person gave on a page of photos
splits.py                                    images that a run trains on and holds out
splits_table.py, evaluation_data.py          splits.parquet, their list; images to evaluate
images.py                                    images decoded on demand
aspect_ratio.py                              from any aspect ratio to the input of the model
sampling.py, augmentation.py, batches.py     batches, as a function of the seed and the step
workers.py                                   processes that load batches
"""
