"""Pre-training on images without labels.

pretrain.py   recipe of pre-training: data, model, loss and evaluator
lejepa.py     LeJEPA; its loss, its crops and its projector
"""
