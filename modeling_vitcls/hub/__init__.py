"""Hugging Face Hub: load models, write cards, push, verify what was pushed, publish Spaces.

    connection.py              timeouts, retries and errors of calls to the Hub
    loading.py                 model name -> local folder; from the Hub or its cache; timm's models
    local_paths.py             names that are paths of this machine
    revisions.py               branch or tag -> commit
    provenance.py              the base model of a model, and its license
    licenses.py                licenses in a card's header and text
    card.py                    model cards: classifiers, encoders, training checkpoints
    card_results.py            measured values in a card
    card_training.py           the training section of a card
    card_renaming.py           a card under the name of its repository
    push_permissions.py        check before training that a token may push
    manifest.py                published files of a model folder; resumable checkpoints; sample images in cards
    publish.py                 push: one commit, with retries
    verify.py                  load a published commit in a new process and compare its outputs
    verification_process.py    start that process
    verification_script.py     what runs in it; imports nothing of this package
    verification_reference.py  the outputs that it is compared with
    shared_code.py             one copy of the code for many models
    space.py                   a Space with the demo

Nothing here is copied to the Hub.
"""
