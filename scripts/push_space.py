# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[demo]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Publish the page of demo_app.py as a Space on the Hub. This script is equivalent to `vitcls space`.

python scripts/push_space.py --model me/my-model --space-id me/my-model-demo
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "space"]

    from modeling_vitcls.cli import main

    main()
