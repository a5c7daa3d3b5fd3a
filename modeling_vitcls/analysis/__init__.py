"""Attention, statistics and diagnosis of special tokens.

from modeling_vitcls.analysis.inspection import inspect_model
from modeling_vitcls.analysis.report import write_page
write_page("report.html", inspect_model(model, processor, images))

options.py              flags of `vitcls inspect` and `vitcls look`
token_use.py            which tokens the outputs of a model read, and in how many layers
maps.py                 attention to patches as maps on the pixels of an image
attribution.py          attention of every layer, and gradient attribution
token_statistics.py     statistics over many images, per layer, head and token
ablation.py             effects of tokens on the outputs for many images, with null distributions
diagnosis.py            verdicts with measured values; patches with large norms
verdict_texts.py        sentences of verdicts
model_utils.py          helpers that unwrap models and set evaluation mode
image_report.py         predictions, maps and patch features (PCA) of one image
figures.py              figures of statistics, for reports and notebooks
register_neurons.py     neuron activations moved from patches to a register, without training
inspection.py           all measurements for a model and images
inspection_images.py    the images of `vitcls inspect`, with names and labels
report.py               the HTML report, and its values for programs
inspect_tokens.py       the command `vitcls inspect`
photo.py                attention of the tokens and features of the patches in one photo
sheet.py                the sheet of one photo as an image
look.py                 the command `vitcls look`
audit.py                wrong labels, duplicates and unusual images of a dataset
"""
