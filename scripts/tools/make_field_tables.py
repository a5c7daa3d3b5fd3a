"""Write the tables of fields in docs/configuration.md: python scripts/tools/make_field_tables.py

The texts are those below the fields of `ViTCLSConfig`, and the headings are the comments above each
group of fields. Run it after a change of a field; a test compares the page with the fields.
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/configuration.md"
SOURCE = ROOT / "modeling_vitcls/model/configuration_vitcls.py"
MARKS = (
    "<!-- fields: from here on, scripts/tools/make_field_tables.py writes -->\n",
    "<!-- end of fields -->\n",
)
HEADING = re.compile(r"    # (\w[\w ,]*)")


def build_tables() -> str:
    """Build a Markdown table of each group of fields, in the order of the class."""
    text = SOURCE.read_text(encoding="utf-8")
    lines = text.splitlines()
    (config,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == "ViTCLSConfig"
    )
    parts: list[str] = []
    for field, explanation in zip(config.body, config.body[1:], strict=False):
        is_text = isinstance(explanation, ast.Expr) and isinstance(explanation.value, ast.Constant)
        if not isinstance(field, ast.AnnAssign) or not is_text:
            continue
        heading = HEADING.fullmatch(lines[field.lineno - 2])
        if heading is not None:
            parts.append(f"\n### {heading[1]}\n\n| field | values | meaning |\n|---|---|---|\n")
        name = ast.unparse(field.target).removeprefix("_")
        values = describe_values(field).replace("|", "\\|")
        meaning = " ".join(str(ast.literal_eval(explanation.value)).split()).replace("|", "\\|")
        parts.append(f"| `{name}` | {values} | {meaning} |\n")
    return "".join(parts)


def describe_values(field: ast.AnnAssign) -> str:
    """Describe the values of a field, the default first: 'cls', 'mean'; 12, `int`."""
    kind = ast.unparse(field.annotation).removesuffix(" | None")
    default = field.value
    if isinstance(default, ast.Call):  # of a kind of field, such as width(default=768)
        default = default.keywords[0].value
    assert default is not None, f"{ast.unparse(field.target)} has no default"
    choices = re.fullmatch(r"Literal\[(.*)\]", kind)
    if choices is None:
        return f"`{ast.unparse(default)}`, `{kind}`"
    values = dict.fromkeys([ast.unparse(default), *choices[1].split(", ")])
    return ", ".join(f"`{value}`" for value in values).replace("'", '"')


def replace_tables(page: str) -> str:
    """Replace the tables between the two marks of a page."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{build_tables()}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
