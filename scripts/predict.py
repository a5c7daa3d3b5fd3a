# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Predict the labels of images, or write their features.

This script is equivalent to `vitcls predict`.

python scripts/predict.py --model runs/mine photo.jpg path/to/folder
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "predict"]

    from modeling_vitcls.cli import main

    main()
