"""Fonts for names in any script: Chinese, Thai, emoji.

matplotlib draws with its own font, which lacks them. Other installed fonts take over. Characters that
no font can draw become their numbers in Unicode, so two names never look the same.
"""

import re
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text


LAST_RESORT = "Last Resort"  # A font of matplotlib that draws boxes


def use_installed_fonts(figure: Figure) -> None:
    """Let each text of a figure use the installed fonts that can draw it."""
    own_font = get_font(findfont(FontProperties()))
    for text in figure.findobj(Text):
        content = text.get_text()
        missing = {
            character
            for character in content
            if not character.isspace() and not own_font.get_char_index(ord(character))
        }
        families = {character: find_family(character) for character in sorted(missing)}
        undrawable = "".join(character for character, family in families.items() if not family)
        if undrawable:
            content = re.sub(f"[{re.escape(undrawable)}]+", write_numbers, content)
        if missing:
            found = dict.fromkeys(family for family in families.values() if family)
            text.set(text=content, family=[*FontProperties().get_family(), *found])


def write_numbers(characters: re.Match[str]) -> str:
    """Write characters as their numbers in Unicode, such as [732B 732B]."""
    return f"[{' '.join(f'{ord(character):X}' for character in characters[0])}]"


@cache
def find_family(character: str) -> str | None:
    """Find an installed font that can draw a character; None if there is none."""
    for entry in fontManager.ttflist:
        if entry.name.startswith(LAST_RESORT):
            continue
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):  # Removed since, or of colored bitmaps
            continue
        if font.scalable and font.get_char_index(ord(character)):
            return entry.name
    return None
