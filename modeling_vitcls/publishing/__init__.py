"""Publish a model folder: write cards, push, verify pushes, publish Spaces.

card.py                    model cards: classifiers, encoders, training checkpoints
conversion_card.py         model card of a converted model
card_results.py            measured values in a card
card_sections.py           card templates, and the sections on use, citation and training
code_files.py              the code files of a model: digest, reading order, differences from this package
card_renaming.py           replacement of the model's name in a card with the repository id
adapters.py                LoRA adapters without the base model
push_permissions.py        permissions of the token, checked before training
manifest.py                published files of a model folder; resumable checkpoints; sample images in cards
publish.py                 push: one commit, with retries
endpoint_handler.py        handler.py for Inference Endpoints, independent of this package
verify.py                  verification of a published model, which is loaded in a new process
verification_script.py     the script that the new process runs, independent of this package
verification_reference.py  the reference model for the comparison with the published model
shared_code.py             one copy of the code for many models
space.py                   a Space with the demo
static_space.py            a Space with a page that runs the model in the browser
"""
