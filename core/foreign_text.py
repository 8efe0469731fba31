"""Text from outside, made safe to show: names of uploads, manifests, labels, paths and what is inside files of others.

Such text may hold escape sequences that move a terminal's cursor, a million letters, or line breaks that imitate another message.
`shown` is the only way such text gets into a message, a table or a page; `check_name` is the only way it becomes part of a path.
"""

from __future__ import annotations

import unicodedata

LONGEST_NAME = 200
"""Letters of the longest name that is taken for a frame, a segment or a split; file systems end at 255 bytes."""


def shown(text: object, *, most: int = 200) -> str:
    """Make a value from outside fit for one line of a terminal, a log or a page.

    Args:
        text: The value; anything but text is turned into text first.
        most: Letters to keep. A longer text ends with `…`.

    Returns:
        The text without control characters, line breaks and direction marks: each becomes its escape, such as `\\x1b`.

    Example:
        >>> shown("scan\\x1b[2J")
        'scan\\\\x1b[2J'
    """
    try:
        letters = str(text)
    except (ValueError, RecursionError):  # a number of ten thousand digits, lists nested a thousand deep
        letters = f"a {type(text).__name__} too large to show"
    cut = letters[:most]
    plain = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode() for c in cut)
    return plain if len(letters) <= most else f"{plain}…"


def is_one_name(text: str) -> bool:
    """Say whether a text can be the name of a class or of a point feature.

    Args:
        text: The text.

    Returns:
        Whether it has 1 to `LONGEST_NAME` printable letters and no blank at its ends.
    """
    return 0 < len(text) <= LONGEST_NAME and text == text.strip() and shown(text, most=LONGEST_NAME) == text


def is_one_word(text: str) -> bool:
    """Say whether a text can stand in a column of a label file.

    Args:
        text: The text.

    Returns:
        Whether it is the name of a class (`is_one_name`) without a blank in it.
    """
    return is_one_name(text) and len(text.split()) == 1


def check_name(name: str, what: str) -> str:
    """Refuse a name from outside that cannot safely be a file name.

    Args:
        name: Id of a frame, a segment or a split.
        what: What it names, for the message: "frame id".

    Returns:
        The same name.

    Raises:
        InvalidInput: It is empty, too long, `.` or `..`, starts with a dot, or holds a slash, a backslash or a control character.
    """
    from .errors import InvalidInput  # errors use `shown` themselves

    bad = not name or len(name) > LONGEST_NAME or name.startswith(".") or "/" in name or "\\" in name or name != name.strip()
    if bad or shown(name, most=LONGEST_NAME) != name:
        raise InvalidInput(
            f"the {what} {shown(name)!r} cannot be a file name: it must have 1 to {LONGEST_NAME} printable letters, no slash, and no dot "
            "in front; rename it"
        )
    return name
