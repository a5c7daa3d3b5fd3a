"""The demo: a page that says what a model sees in a picture, and what its special tokens look at.

    reader.py    a picture -> probabilities of labels, attention of the special tokens
    page.py       the page around it, with gradio

It runs on one's own machine (scripts/demo_app.py) and as a Space, where this package is not installed: hub/space.py
lists the files that go there. So what is here imports of ours only files of that list.
"""
