"""What the special tokens of a model do: attention, effects and faults.

photo -> sheet -> page; many images -> effects, faults -> page

options.py              flags of `vitcls inspect` and `vitcls look`
token_use.py            which tokens the outputs of a model read, and in how many layers
maps.py                 attention to patches as maps, and as pictures over the photo
attention.py            attention of the special tokens in every layer
removal.py              what the score of a label loses without each part of a photo
ablation.py             effects of tokens on the outputs for many images, with null distributions
faults.py               identical tokens, tokens that did not move, patches with outlier norms
inspection.py           all measurements for a model and images: what a page shows
report.py               the HTML report
pages.py                HTML of the report and of sheets, from templates
inspect_tokens.py       the command `vitcls inspect`, and its images with their labels
photo.py                predictions, attention of the tokens and features of the patches in one photo
sheet.py                the sheet of one photo: texts and pictures
sheet_image.py          the same as one image, drawn by matplotlib
look.py                 the command `vitcls look`
"""
