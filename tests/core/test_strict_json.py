"""JSON from outside is read strictly, and one value has one spelling."""

import pytest

from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.strict_json import canonical_json, strict_json


class Refused(UpcycleError):
    """An error of the caller."""


def test_one_value_has_one_spelling():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null]}'
    assert canonical_json({"a": "é", "b": [1, 2.5, None]}) == canonical_json({"b": [1, 2.5, None], "a": "é"})
    assert strict_json(canonical_json({"a": 0.1 + 0.2}), "it") == {"a": 0.1 + 0.2}
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    "data",
    [b'{"a": 1, "a": 2}', b"[NaN]", b"[1e999, Infinity]", b"{", b"", b"\xff", b"[" * 100_000, b"1" * 10_000],
    ids=["key twice", "NaN", "infinity", "open", "empty", "no UTF-8", "deep", "long integer"],
)
def test_what_python_reads_leniently_is_refused_with_the_callers_error(data):
    with pytest.raises(InvalidInput, match="the letter is not valid JSON"):
        strict_json(data, "the letter")
    with pytest.raises(Refused, match="the letter is not valid JSON"):
        strict_json(data, "the letter", Refused)
