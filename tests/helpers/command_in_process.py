"""Run the vitcls command in the test process."""

from modeling_vitcls import cli


def run_here(*arguments: str) -> int:
    """Run `vitcls` in this process and return its exit status."""
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
