"""Demo page that shows the predictions of a model for an image, and the attention of the special tokens.

    page.py      the page, built with gradio
    static.*     the page of a static Space, which runs the model in the browser (publishing/static_space.py)

The demo runs locally (`vitcls demo`) or in a Space, where this package is not installed. `PAGE_FILES` in
publishing/space.py lists the files that are copied to a Space; these files import no other files of this package.
"""
