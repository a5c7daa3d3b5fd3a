"""Publish a model folder: report, card, push and verification.

They read the files of the folder, and nothing else.

report.py                  report.html and the card's sheet; what follows a run or an addition
card.py                    README.md, with one template per kind of model in templates/
card_parts.py              the fields and sections of a card, and which of them a person edited
wrong_photos.py            wrong predictions of a run or an addition, for the report
labels_page.py             the page on which a person says what photos show
review.py                  the same page about photos without labels, of `predict --review`
published_files.py         the files that a push publishes
push.py                    permissions and the push
push_model.py              what `model.push_to_hub` uploads
shared_code.py             one code for many models: its repository, and the code of published models
verify.py                  verification of a published model, which is loaded in a new process
verification_script.py     the script that the new process runs, independent of this package
"""
