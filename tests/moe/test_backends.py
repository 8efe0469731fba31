"""All backends compute the same mixture: output and every gradient, on odd sizes, empty experts, no tokens, and poisoned memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_banks import bank_of, poisoned_memory, token_by_token
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.backends import BACKEND_RULES, DispatchCase, choose_backend, dispatch_case
from upcycle3d.perception.moe.layers.dispatch import DispatchPlan
from upcycle3d.perception.moe.layers.grouped import combine_rows, gather_rows, grouped_linear

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("loop", "sorted", "grouped", "dense_all", "auto")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradients(bank, x, index, weight, run):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bank.zero_grad()
    y = run(x, index, weight)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), x.grad, weight.grad, *[parameter.grad.clone() for parameter in bank.parameters()]]


CASES = {
    "balanced": (bank_of(), torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]])),
    "empty experts": (bank_of(), torch.tensor([[2, 0], [0, 2], [2, 0]])),
    "one takes all": (bank_of(), torch.tensor([[3], [3], [3]])),
    "k = E": (bank_of(3), torch.tensor([[0, 1, 2], [2, 1, 0]])),
    "no tokens": (bank_of(), torch.zeros(0, 2, dtype=torch.int64)),
    "one expert": (bank_of(1), torch.tensor([[0], [0]])),
    "odd widths": (bank_of(3, (7, 5, 3)), torch.tensor([[0, 2], [1, 0], [2, 0], [0, 1]])),
    "odd hidden units of a gate": (bank_of(3, (8, 6, 4), gated=True, activation="silu"), torch.tensor([[1, 0], [0, 1]])),
    "no bias": (bank_of(hidden_bias=False, out_bias=False, activation="relu"), torch.tensor([[0, 1], [2, 1]])),
    "same expert twice": (bank_of(), torch.tensor([[1, 1], [0, 1]])),
}


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_output_and_all_gradients_are_those_of_the_definition(case, backend):
    bank, index = CASES[case]
    torch.manual_seed(1)
    x, weight = torch.randn(len(index), bank.shape.width_in), torch.rand(index.shape)
    wanted = gradients(bank, x, index, weight, lambda *a: token_by_token(bank, *a)) if len(x) else None
    with poisoned_memory():
        found = gradients(bank, x, index, weight, lambda *a: bank(*a, backend=backend))
    if wanted is None:
        wanted = [torch.zeros_like(f) for f in found]
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each_backend
def test_soft_routing_is_the_weighted_sum_of_all_experts(backend):
    bank, x, weight = bank_of(), torch.randn(5, 8), torch.rand(5, 4)
    index = torch.arange(4).expand(5, 4)
    wanted = gradients(bank, x, index, weight, lambda *a: token_by_token(bank, *a))
    found = gradients(bank, x, None, weight, lambda *a: bank(*a, backend=backend))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert bank(x[:0], None, weight[:0], backend=backend).shape == (0, 16)


@each_backend
def test_an_expert_without_tokens_gets_gradients_of_zeros_and_not_none(backend):
    bank = bank_of()
    with poisoned_memory():
        bank(torch.randn(3, 8), torch.tensor([[1], [1], [3]]), torch.ones(3, 1), backend=backend).sum().backward()
    for parameter in bank.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[[0, 2]] == 0).all()
        assert (parameter.grad[[1, 3]].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_gradients_agree_with_finite_differences(backend):
    bank, index = bank_of(3, (3, 4, 2)).double(), torch.tensor([[0, 2], [2, 0], [0, 2]])
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in bank.named_parameters()]

    def run(x, weight, *parameters):
        return torch.func.functional_call(bank, dict(zip(names, parameters)), (x, index, weight, backend))

    inputs = (x, weight, *[p.detach().clone().requires_grad_() for p in bank.parameters()])
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_gradients_per_example_by_vmap_through_all_experts():
    bank, x, index, weight = bank_of(), torch.randn(3, 8), torch.tensor([[0, 1], [2, 0], [3, 1]]), torch.rand(3, 2)

    def loss(parameters, x, index, weight):
        args = (x[None], index[None], weight[None], "dense_all")
        return torch.func.functional_call(bank, parameters, args).square().sum()

    parameters = {name: p.detach() for name, p in bank.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x, index, weight)
    for t in range(3):
        bank.zero_grad()
        bank(x[t : t + 1], index[t : t + 1], weight[t : t + 1], "loop").square().sum().backward()
        for name, parameter in bank.named_parameters():
            torch.testing.assert_close(each[name][t], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sorted", "grouped", "dense_all", "auto"])
def test_two_steps_of_training_with_a_router_end_at_the_same_weights(backend):
    """A wrong gradient of the router, or a row that nobody wrote, shows in the second step at the latest."""

    def train(backend):
        bank, rows = bank_of(), torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)))
        optimizer = torch.optim.SGD([*bank.parameters(), rows], lr=0.05)
        for step in range(2):
            x = torch.randn(30, 8, generator=torch.Generator().manual_seed(step))
            top, index = (x @ rows.T).softmax(1).topk(2)
            optimizer.zero_grad()
            bank(x, index, top, backend=backend).square().mean().backward()
            optimizer.step()
        return [rows.detach(), rows.grad, *[p.detach() for p in bank.parameters()]]

    wanted = train("loop")
    with poisoned_memory():
        found = train(backend)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
def test_gradients_that_do_not_lie_in_memory_order_are_taken(backend, gradient):
    bank, x, index, weight = bank_of(), torch.randn(6, 8), torch.tensor([[0], [1], [2], [1], [0], [1]]), torch.ones(6, 1)
    y = bank(x, index, weight, backend=backend)
    y.sum().backward() if gradient == "expanded" else y.t().reshape(-1).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in bank.parameters())


@each_backend
def test_under_autocast_all_compute_in_its_type_and_keep_the_gradients_of_the_weights(backend):
    bank, x, index = bank_of(), torch.randn(6, 8), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    weight = torch.rand(6, 2, requires_grad=True)
    exact = bank(x, index, weight, backend="loop")
    with torch.autocast("cpu", torch.bfloat16):
        y = bank(x, index, weight, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.15, rtol=0.05)
    y.float().square().mean().backward()
    assert weight.grad.dtype == bank.down_proj.grad.dtype == torch.float32
    double = bank_of().double()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(x.double(), index, weight.double(), backend=backend).dtype == torch.float64


def test_only_the_gradients_that_are_needed_are_computed():
    """With frozen experts, as when only routers are trained, the weights get none."""
    bank = bank_of().requires_grad_(False)
    weight = torch.rand(2, 1, requires_grad=True)
    bank(torch.randn(2, 8), torch.tensor([[0], [1]]), weight, backend="sorted").sum().backward()
    assert weight.grad is not None
    assert all(parameter.grad is None for parameter in bank.parameters())


def test_the_parts_serve_chains_of_more_than_two_layers():
    plan = DispatchPlan.of(torch.tensor([[2], [0], [2]]), 3)
    x, weight, bias = torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 5)
    rows = grouped_linear(gather_rows(x, plan), weight, bias, plan)
    y = combine_rows(rows, torch.ones(3, 1), plan)
    wanted = torch.stack([weight[e] @ x[t] + bias[e] for t, e in enumerate((2, 0, 2))])
    torch.testing.assert_close(y, wanted)


def test_many_rows_of_an_expert_are_computed_piece_by_piece_without_gradients():
    """More rows than `sorted` takes at a time; the oracle is the plain loop."""
    bank = bank_of(2, (8, 12, 8))
    x, index = torch.randn(1500, 8), (torch.arange(1500) % 7 == 0).long()[:, None]
    with torch.no_grad():
        found = bank(x, index, torch.ones(1500, 1), backend="sorted")
    torch.testing.assert_close(found, bank(x, index, torch.ones(1500, 1), backend="loop"))


def test_products_of_16_bits_keep_to_a_few_numbers_of_rows():
    """The CPU's library compiles such a product for each new number of rows, and a router gives new numbers in every step."""

    seen: set[int] = set()

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.add(args[-2].shape[0])
            return func(*args, **(kwargs or {}))

    bank, draw = bank_of(2, (8, 12, 8)), torch.Generator().manual_seed(0)
    for _ in range(20):
        x, index = torch.randn(150, 8, generator=draw), torch.randint(0, 2, (150, 1), generator=draw)
        with torch.autocast("cpu", torch.bfloat16):
            found, weight = bank(x, index, torch.ones(150, 1)), torch.ones(150, 1)
            torch.testing.assert_close(found, bank(x, index, weight, backend="loop"), atol=0.02, rtol=0.02)
            with Rows():
                bank(x, index, weight)
    assert seen <= {64, 128, 192}


# ---- the plan


def test_a_plan_sorts_the_choices_and_finds_them_again():
    index = torch.tensor([[3, 1], [1, 0], [3, 1]])
    plan = DispatchPlan.of(index, 5)
    assert (plan.tokens, plan.k, plan.num_experts) == (3, 2, 5)
    assert plan.counts == (1, 3, 0, 2, 0)
    assert plan.expert.tolist() == [0, 1, 1, 1, 3, 3]
    assert plan.token.tolist() == [1, 0, 1, 2, 0, 2]
    assert plan.order[plan.inverse].tolist() == list(range(6))
    assert plan.offsets.dtype == torch.int32
    assert plan.offsets.tolist() == [1, 4, 4, 6, 6]
    every = DispatchPlan.of_all(3, 4, torch.device("cpu"))
    same = DispatchPlan.of(torch.arange(4).expand(3, 4), 4)
    assert all(torch.equal(getattr(every, name), getattr(same, name)) for name in ("index", "order", "inverse"))
    assert every.bounds == same.bounds
    assert DispatchPlan.of_all(0, 4, torch.device("cpu")).bounds == (0,) * 5


@pytest.mark.parametrize("bounds", [(0, 1), (0, 3), (0, 2, 1, 2), (1, 2), (2,)])
def test_a_plan_refuses_bounds_that_do_not_end_at_the_number_of_rows(bounds):
    good = DispatchPlan.of(torch.tensor([[0], [0]]), 1)
    with pytest.raises(InvalidInput, match="must ascend from 0 to the number of choices, 2"):
        DispatchPlan(index=good.index, order=good.order, inverse=good.inverse, bounds=bounds)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([[4]]), r"there are 4 experts, 0\.\.3, and the choices lie in 4\.\.4"),
        (torch.tensor([[-1]]), "does not exist"),
        (torch.tensor([[65536]]), "does not exist"),
        (torch.tensor([0]), r"shape \(T, k\)"),
        (torch.zeros(2, 0, dtype=torch.int64), "k >= 1"),
        (torch.tensor([[0.0]]), "must be integers"),
    ],
)
def test_choices_that_cannot_be_are_refused(index, message):
    with pytest.raises(InvalidInput, match=message):
        DispatchPlan.of(index, 4)


# ---- the rule


def test_every_row_of_the_rule_decides_some_case():
    case = {"soft": False, "device": "cpu", "grouped_serves": True, "rows_per_expert": 1000.0}
    few = {"rows_per_expert": 50.0}
    chosen = [
        choose_backend(DispatchCase(**(case | change)))
        for change in ({"soft": True}, few | {"grouped_serves": False}, {"device": "cuda"}, {"sixteen_bits": True}, few, {})
    ]
    assert chosen == list(BACKEND_RULES)
    assert [rule.backend for rule in chosen] == ["dense_all", "sorted", "grouped", "sorted", "grouped", "sorted"]


def test_the_rule_sees_types_sizes_and_rows():
    x = torch.randn(100, 8)
    case = dispatch_case(x, bank_of()._weights(), 200)
    assert (case.soft, case.device, case.rows_per_expert) == (False, "cpu", 50.0)
    assert case.grouped_serves
    assert not case.sixteen_bits
    assert dispatch_case(x.bfloat16(), bank_of().bfloat16()._weights(), 200).sixteen_bits
    assert not dispatch_case(x.double(), bank_of().double()._weights(), 200).grouped_serves
    assert not dispatch_case(torch.randn(4, 7), bank_of(3, (7, 8, 8))._weights(), 4).grouped_serves
    assert not dispatch_case(x.bfloat16(), bank_of(3, (8, 12, 8)).bfloat16()._weights(), 4).grouped_serves
    assert dispatch_case(x, bank_of()._weights(), None).soft
