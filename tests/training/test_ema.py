"""The mean teacher follows its closed form, buffers included."""

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.training.ema import ema_decay, make_teacher, update_ema


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _randomise(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(7)


def _closed_form(history: list[torch.Tensor], first: torch.Tensor, decays: list[float]) -> torch.Tensor:
    """d_n ... d_0 first + sum over k of (1 - d_k) d_{k+1} ... d_n student_k, in float64."""
    result = torch.zeros_like(first, dtype=torch.float64)
    remaining = 1.0
    for student, decay in zip(reversed(history), reversed(decays)):
        result += remaining * (1 - decay) * student.double()
        remaining *= decay
    return result + remaining * first.double()


def test_teacher_equals_the_closed_form_and_has_the_last_statistics():
    student = _network()
    teacher = make_teacher(student)
    first = {name: t.clone() for name, t in student.state_dict().items()}
    steps = list(range(5, 17))  # not from 0, so that the first teacher still counts
    history = []
    for step in steps:
        _randomise(student, step)
        update_ema(teacher, student, step, max_decay=0.9)
        history.append({name: t.clone() for name, t in student.state_dict().items()})
    decays = [min(1 - 1 / (s + 1), 0.9) for s in steps]
    for name, found in teacher.state_dict().items():
        if name in dict(teacher.named_parameters()):
            expected = _closed_form([h[name] for h in history], first[name], decays)
            assert torch.allclose(found.double(), expected, atol=1e-6), name
        else:
            assert torch.equal(found, history[-1][name]), name


def test_first_update_makes_the_teacher_the_student_exactly():
    student = _network()
    teacher = make_teacher(student)
    _randomise(student, 1)
    update_ema(teacher, student, step=0)
    assert all(torch.equal(t, student.state_dict()[name]) for name, t in teacher.state_dict().items())


def test_decay_ramps_up_to_its_maximum():
    assert [ema_decay(s) for s in (0, 1, 9)] == pytest.approx([0.0, 0.5, 0.9])
    assert ema_decay(100_000) == 0.999


def test_teacher_is_a_frozen_copy_in_eval_mode():
    student = _network()
    teacher = make_teacher(student)
    update_ema(teacher, student, 3)
    assert not teacher.training
    assert student.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher[0].weight.data_ptr() != student[0].weight.data_ptr()


def test_a_shared_frozen_part_is_left_alone():
    student = _network()
    teacher = make_teacher(student)
    teacher[1] = student[1]
    before = {name: t.clone() for name, t in student[1].state_dict().items()}
    update_ema(teacher, student, 3)
    assert all(torch.equal(t, before[name]) for name, t in student[1].state_dict().items())


def test_different_networks_are_refused_by_name():
    student = _network()
    with pytest.raises(InvalidInput, match=r"only the student has \['1.bias', '1.weight'\]"):
        update_ema(nn.Sequential(nn.Linear(3, 4)), student, 0)
    with pytest.raises(InvalidInput, match=r"'0.weight' is \(4, 5\) in the teacher and \(4, 3\) in the student"):
        update_ema(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), student, 0)


def test_a_frozen_parameter_keeps_every_bit():
    """-0 and +0 are equal and have different bits: an averaged frozen encoder would get another fingerprint than the fleet's."""
    student = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[-0.0, 0.0], [1e-38, -3.0]]))
    student.requires_grad_(False)
    teacher = make_teacher(student)
    for step in range(3):
        update_ema(teacher, student, step)
    assert torch.equal(teacher.weight.view(torch.int32), student.weight.view(torch.int32))
