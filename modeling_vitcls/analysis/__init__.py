"""Attention, statistics and diagnosis of special tokens.

from modeling_vitcls.analysis.report import write_report
write_report("report.html", model, processor, images)

maps.py                 attention to patches as maps on the pixels of an image
attribution.py          attention rollout and gradient attribution through all layers
token_statistics.py     statistics over many images, per layer, head and token
model_outputs.py        predictions or features that a model outputs for many images
ablation.py             effects of tokens on outputs, with null distributions
artifacts.py            patches with large norms
diagnosis.py            verdicts as text, with measured values
map_checks.py           checks whether rollout and attribution show what predictions depend on
patch_features.py       patch features as colors (PCA)
attention_recorder.py   attention of every layer of a forward pass
model_utils.py          helpers that unwrap models and set evaluation mode
image_report.py         predictions and maps of one image
figures.py              figures of statistics, for reports and notebooks
test_time_registers.py  neuron activations moved from patches to a register, without training
inspection_inputs.py    images and labels of an inspection
inspection.py           all measurements for a model and images
report_data.py          an inspection as JSON values
report.py               the HTML report
inspect_tokens.py       the command `vitcls inspect`
"""
