"""Texts that others wrote (names, labels, settings), made safe to print and to put on a page."""

import re

MARKS = r"[\\`*\[\]<>|$~&#!@]|(?<!\w)_|_(?!\w)|:(?=//)"  # what Markdown or HTML would read


def printable(value, limit=40):
    """The value as one line of at most `limit` characters; what cannot be printed becomes "�".

    That is control characters, line ends, lone surrogates, and marks that hide or reorder text.
    """
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def escaped(value, limit=40):
    """printable(value, limit), which Markdown and HTML show as it is."""
    return re.sub(MARKS, r"\\\g<0>", printable(value, limit))
