"""The type of an option that names a split of a prepared dataset: `--data DIR[:SPLIT]`, one word in every command.

`tools/extract.py` does not use it: a vehicle's command must not load `datasets`. Read next: `datasets/data_split.py`.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from ..datasets.data_split import DataSplit

DataOption = Annotated[
    DataSplit,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=DataSplit.SYNTAX,
        instance_from_str=lambda words: DataSplit.parse(words[0]),
        is_instance=lambda value: isinstance(value, DataSplit),
        str_from_instance=lambda split: [str(split)],
    ),
]
