"""Spaces on the Hub that show a model. ../push_space.py writes and pushes them.

space.py           a Space with the page of `vitcls demo`, which runs the model on a server
static_space.py    a Space with a page that runs the model in the browser
static.*           this page
"""
