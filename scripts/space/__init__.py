"""Spaces on the Hub that show a model. ../push_space.py writes and pushes them.

space.py              a Space with transformers' pipeline of the model, which runs on a server
static_space.py       a Space with a page that runs the model in the browser
static.*              this page
transformers_js.py    the copy of the model that this page runs
"""
