"""Run the vitcls command, or parse its flags, in the test process."""

from typing import Any

import tyro

from modeling_vitcls import cli
from modeling_vitcls.cli.flag_messages import messages_name_flags
from modeling_vitcls.cli.parsing import TYRO_CONFIG, one_line_errors, prepare_flags
from modeling_vitcls.runtime.flags import get_flag_fields


def run_here(*arguments: str) -> int:
    """Run `vitcls` in this process and return its exit status."""
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def parse_flags(options_class: Any, flags: list[str]) -> Any:
    """Return the options of flags and the recipe in --config.

    Exit with status 2 if a flag is invalid.
    """
    flags = prepare_flags("finetune", options_class, flags)
    with messages_name_flags(get_flag_fields(options_class)), one_line_errors():
        return tyro.cli(options_class, args=flags, config=TYRO_CONFIG)
