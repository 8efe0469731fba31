"""Which implementation runs: the kernel of the device where there is one, the reference everywhere else."""

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.dispatch import device_of, dispatch


def reference(x: torch.Tensor) -> str:
    return "reference"


def kernel(x: torch.Tensor) -> str:
    return "kernel"


HERE, ELSEWHERE = torch.zeros(1), torch.zeros(1, device="meta")


def test_a_kernel_serves_its_device_only():
    assert dispatch((HERE,), reference, cpu=kernel) is kernel
    assert dispatch((HERE,), reference, cuda=kernel) is reference
    assert dispatch((ELSEWHERE,), reference, cpu=kernel, cuda=kernel) is reference


def test_without_a_kernel_the_reference_runs():
    assert dispatch((HERE,), reference) is reference
    assert dispatch((HERE,), reference, cpu=None) is reference


def test_tensors_on_two_devices_are_refused_with_their_names():
    with pytest.raises(InvalidInput, match="one device, but they lie on cpu and meta"):
        dispatch((HERE, ELSEWHERE), reference, cpu=kernel)
    assert device_of(HERE, HERE).type == "cpu"
