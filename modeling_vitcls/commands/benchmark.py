"""`vitcls benchmark`: measure speed by backend and precision, and compare it with timm and transformers.

    vitcls benchmark --model runs/mine
    vitcls benchmark --work inference step --backends torch compiled --peers timm transformers --markdown speed.md

All rows are measured in turn, several times. The ratios are medians of the ratios in each round. Speed is compared
only if the outputs agree. The benchmark is implemented in modeling_vitcls/benchmark.py.
"""

from ..options import BenchmarkOptions


OPTIONS_CLASS = BenchmarkOptions


def run(options: BenchmarkOptions) -> None:
    """Measure, print the table, and write the file."""
    from ..benchmark import format_markdown, run_benchmarks
    from .export import silence_exporters

    silence_exporters()
    text = format_markdown(run_benchmarks(options), options)
    print(f"\n{text}")
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
