"""What the special tokens of a model do: attention, effects and layers.

photo -> sheet -> page; many images -> effects (evaluation/token_effects.py), layers -> page

options.py              flags of `vitcls inspect` and `vitcls look`
token_use.py            which tokens the outputs of a model read, and in how many layers
maps.py                 attention to patches as maps, and as pictures over the photo
inspection.py           all measurements for a model and images: what a page shows
register_neurons.py     the MLP neurons that write outliers, for a register without training
layer_table.py          norms, attention, outliers and similarities of each layer and group
report.py               the HTML report
pages.py                HTML of the report and of sheets, from templates
inspect_tokens.py       the command `vitcls inspect`, and its images with their labels
photo.py                predictions, attention of the tokens and features of the patches in one photo, and what a
                        score loses without each part of it
sheet.py                the sheet of one photo: texts and pictures
look.py                 the command `vitcls look`, and the sheet as one image
"""
