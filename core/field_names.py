"""Which field of a file that names its fields (`.pcd`, structured `.npy`) is which column of a scan."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InvalidInput
from .foreign_text import shown

_OTHER_NAMES = {"intensity": ("i", "intensities", "reflectivity", "reflectance")}


def find_fields(fields: Sequence[str], columns: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Find the wanted columns among the fields of a file.

    A field of exactly this name comes first, then one that differs in case, then another usual name: a file with `reflectivity` and
    `intensity` gives its intensity.

    Args:
        fields: Names of the fields, in file order.
        columns: Wanted columns; `_` means nothing here. Empty for x, y, z, and intensity where the file has it.

    Returns:
        The names of the columns, and the number of the field of each.

    Raises:
        InvalidInput: There is no such field.
    """

    def place(column: str) -> int | None:
        lower = [field.lower() for field in fields]
        for names, name in ((fields, column), *((lower, n) for n in (column.lower(), *_OTHER_NAMES.get(column, ())))):
            if name in names:
                return names.index(name)
        return None

    wanted = tuple(c for c in columns if c != "_") or ("x", "y", "z", *(("intensity",) if place("intensity") is not None else ()))
    found = {column: place(column) for column in wanted}
    missing = [column for column, number in found.items() if number is None]
    if missing:
        raise InvalidInput(
            f"there is no field {shown(', '.join(missing))}; the file has {shown(' '.join(fields))}; name the wanted ones with --columns"
        )
    return wanted, tuple(number for number in found.values() if number is not None)
