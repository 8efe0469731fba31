"""A device that is not there is refused in a sentence, wherever it is named."""

import pytest
import torch

from upcycle3d.core.device import find_device
from upcycle3d.core.errors import InvalidInput


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", "there is no device 'cuda:99' here.*sees"),
        (torch.device("cuda:99"), "there is no device 'cuda:99' here"),
        ("gpu", "'gpu' is not a device"),
        (None, "None is not a device"),
        ("meta", "cpu and cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message):
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InvalidInput, match=message):
        find_device(name)
