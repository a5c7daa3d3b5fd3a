# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[demo]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Serve a web page that shows the predictions and attention of a model.

This script is equivalent to `vitcls demo`.

python scripts/demo_app.py --model runs/mine
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "demo"]

    from modeling_vitcls.cli import main

    main()
