# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Convert a timm or transformers ViT, and write a parity report.

This script is equivalent to `vitcls convert`.

python scripts/convert.py --model timm:vit_base_patch14_reg4_dinov2.lvd142m --output converted
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "convert"]

    from modeling_vitcls.cli import main

    main()
