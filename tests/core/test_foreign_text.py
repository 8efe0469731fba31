"""Text of others must not reach a terminal or a path as it is."""

from __future__ import annotations

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.foreign_text import check_name, shown


def test_control_characters_are_shown_as_escapes_and_letters_stay():
    assert shown("a\x1b[2J\nb\u202ec\x00") == "a\\x1b[2J\\nb\\u202ec\\x00"
    assert shown("Straße 点 é") == "Straße 点 é"


def test_a_long_text_is_cut():
    assert shown("x" * 1000, most=10) == "xxxxxxxxxx…"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\\b", "../../x", "/etc/passwd", "a\x00", "a\x1b", " a", "x" * 201]
)
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(InvalidInput, match="frame id"):
        check_name(name, "frame id")


def test_usual_names_pass():
    for name in ("000123", "segment-1005081002024129653_5313_150_with_camera_labels-000", "n015-2018 Straße"):
        assert check_name(name, "frame id") == name


def test_a_message_that_quotes_a_damaged_file_is_short_and_without_escape_sequences():
    message = str(InvalidInput(f"found \x1b[2J{'x' * 100_000}\nsecond line\n" + "more\n" * 1000))
    assert "\x1b" not in message
    assert "second line" in message
    assert len(message) < 3000
