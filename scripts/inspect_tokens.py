# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Write an HTML report on what the special tokens of a model do.

This script is equivalent to `vitcls inspect`.

python scripts/inspect_tokens.py --model runs/mine photo.jpg path/to/folder --output report.html
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "inspect"]

    from modeling_vitcls.cli import main

    main()
