"""Attention, statistics and diagnosis of special tokens.

photo -> sheet -> page; many images -> statistics, effects -> verdicts -> page

options.py              flags of `vitcls inspect` and `vitcls look`
token_use.py            which tokens the outputs of a model read, and in how many layers
maps.py                 attention to patches as maps, and as pictures over the photo
attribution.py          attention of every layer, and gradient attribution
token_statistics.py     statistics over many images, per layer, head and token
ablation.py             effects of tokens on the outputs for many images, with null distributions
diagnosis.py            verdicts with measured values; patches with large norms
verdict_texts.py        the sentence of a verdict
model_utils.py          helpers that unwrap models and set evaluation mode
figures.py              the curve and the histogram of the report
register_neurons.py     neuron activations moved from patches to a register, without training
inspection.py           all measurements for a model and images
inspection_images.py    the images of `vitcls inspect`, with names and labels
report.py               the HTML report, and its values for programs; page.css is the style of every page
inspect_tokens.py       the command `vitcls inspect`
photo.py                predictions, attention of the tokens and features of the patches in one photo
sheet.py                the sheet of one photo as an image
look.py                 the command `vitcls look`
"""
