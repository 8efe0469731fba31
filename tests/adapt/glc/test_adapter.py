"""The adapter on a small Gaussian domain: it helps, repeats, leaves its inputs alone, and names what it cannot adapt."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.adapter import AdaptConfig, GLCAdapter
from upcycle3d.perception.adapt.glc.class_number import ClassNumberConfig
from upcycle3d.perception.adapt.glc.lead_labels import LeadConfig
from upcycle3d.perception.adapt.glc.metrics import open_set_scores
from upcycle3d.perception.adapt.glc.networks import (
    features_and_probabilities,
    refresh_batch_norm,
    set_learning_rate,
    sgd_with_slow_part,
)
from upcycle3d.perception.adapt.glc.unknown_rule import UnknownRule

SMALL = AdaptConfig(epochs=2, batch_size=32, class_number=5)


@pytest.fixture(scope="module")
def world() -> tuple[nn.Module, nn.Module, Tensor, np.ndarray]:
    """A source model for 4 classes, and a target with 3 of them, moved, and 2 of its own (label 4)."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(6, 16)) * 1.2
    y = rng.integers(0, 4, 800)
    x = torch.from_numpy((means[y] + rng.normal(size=(800, 16))).astype(np.float32))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16))
    classifier = nn.Linear(16, 4)
    network = nn.Sequential(module, classifier)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        for rows in torch.randperm(800).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), torch.from_numpy(y)[rows], label_smoothing=0.1).backward()
            optimizer.step()
    labels = rng.choice([0, 1, 2, 4, 5], 500)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    turn = turn @ np.kron(np.eye(8), [[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]]) @ turn.T
    target = (means[labels] + rng.normal(size=(500, 16))) @ turn.T + 1.5
    return module.eval(), classifier.eval(), torch.from_numpy(target.astype(np.float32)), np.minimum(labels, 4)


def test_adaptation_helps(world):
    module, classifier, x, truth = world
    adapter = GLCAdapter(feature_module=module, classifier=classifier, config=replace(AdaptConfig(), epochs=4, class_number=5))
    before = features_and_probabilities(module, classifier, x)[1].argmax(1).numpy()
    known = truth < 4
    adapted = adapter.fit(x).predict(x)
    assert (adapted.nearest.numpy() == truth)[known].mean() > (before == truth)[known].mean() + 0.05
    assert open_set_scores(adapted.classes.numpy(), truth, [0, 1, 2], 4).h > 0.5


def test_the_seed_decides_whatever_the_global_generator_holds_and_the_source_model_stays(world):
    module, classifier, x, _ = world
    dropout = nn.Sequential(module, nn.Dropout(0.2))
    weights = {name: value.clone() for name, value in dropout.state_dict().items()}
    adapter = GLCAdapter(feature_module=dropout, classifier=classifier, config=SMALL)
    torch.manual_seed(1)
    first = adapter.fit(x).predict(x)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = adapter.fit(x).predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.probabilities, second.probabilities)
    other = GLCAdapter(feature_module=dropout, classifier=classifier, config=replace(SMALL, seed=5)).fit(x).predict(x)
    assert not torch.equal(first.probabilities, other.probabilities)
    assert all(torch.equal(value, weights[name]) for name, value in dropout.state_dict().items())
    assert all(p.requires_grad for p in classifier.parameters())


def test_every_epoch_is_reported_and_the_classifier_is_frozen(world):
    module, classifier, x, _ = world
    seen = []
    adapted = GLCAdapter(feature_module=module, classifier=classifier, config=SMALL).fit(
        x, after_epoch=lambda e, r: seen.append((e, r))
    )
    assert [e for e, _ in seen] == [0, 1]
    assert tuple(r for _, r in seen) == adapted.history
    assert all(0 <= r.unknown_share <= 1 for r in adapted.history)
    assert all(torch.equal(a, b) for a, b in zip(adapted.classifier.parameters(), classifier.parameters()))
    prediction = adapted.predict(x)
    rejected = prediction.classes == 4
    assert torch.equal(rejected, prediction.unknown_scores > adapted.threshold)
    assert torch.equal(prediction.classes[~rejected], prediction.nearest[~rejected])


@pytest.mark.parametrize(
    "config",
    [
        AdaptConfig.paper(),
        replace(SMALL, affinity_weight=0.0),
        replace(SMALL, labeling=LeadConfig()),
        replace(SMALL, class_number=None),
        replace(SMALL, class_number=None, estimate=ClassNumberConfig()),
    ],
)
def test_every_option_runs(world, config):
    module, classifier, x, _ = world
    adapted = GLCAdapter(feature_module=module, classifier=classifier, config=replace(config, epochs=1, batch_size=32)).fit(
        x[:200]
    )
    assert adapted.predict(x).probabilities.isfinite().all()
    assert (adapted.estimate is None) == (config.class_number is not None or config.estimate is None)


def test_an_epoch_ends_after_its_batches_and_a_threshold_may_be_given(world):
    module, classifier, x, _ = world

    def adapt(**changes):
        return GLCAdapter(feature_module=module, classifier=classifier, config=replace(SMALL, fall_back=False, **changes)).fit(x)

    whole, longer, short = adapt(steps_per_epoch=None), adapt(steps_per_epoch=1000), adapt(steps_per_epoch=1)
    assert torch.equal(whole.predict(x).probabilities, longer.predict(x).probabilities)
    assert not torch.equal(whole.predict(x).probabilities, short.predict(x).probabilities)
    assert adapt(unknown=UnknownRule(kind="fixed", value=0.3)).threshold == 0.3
    with pytest.raises(InvalidInput, match="steps_per_epoch must be at least 1"):
        AdaptConfig(steps_per_epoch=0)


def test_fewer_samples_than_a_batch_train_and_fewer_than_neighbors_are_refused(world):
    module, classifier, x, _ = world
    adapter = GLCAdapter(feature_module=module, classifier=classifier, config=replace(SMALL, neighbors=4, class_number=2))
    few = adapter.fit(x[:9])
    assert not torch.equal(few.predict(x).features, features_and_probabilities(module, classifier, x)[0])
    with pytest.raises(InvalidInput, match="4 neighbors of each sample need at least 5 target samples, found 4"):
        adapter.fit(x[:4])
    with pytest.raises(InvalidInput, match="found 0"):
        adapter.fit(x[:0])


def test_what_cannot_be_adapted_is_named(world):
    module, classifier, x, _ = world
    holed = x.clone()
    holed[3] = torch.nan
    with pytest.raises(InvalidInput, match="not finite"):
        GLCAdapter(feature_module=module, classifier=classifier, config=replace(SMALL, refresh_batch_norm=False)).fit(holed)
    with pytest.raises(InvalidInput, match="at least 2 source classes"):
        GLCAdapter(feature_module=module, classifier=nn.Linear(16, 1), config=SMALL).fit(x)
    with pytest.raises(InvalidInput, match="begin no parameter"):
        GLCAdapter(feature_module=module, classifier=classifier, config=replace(SMALL, slow_prefixes=("backbone.",))).fit(x)
    with pytest.raises(InvalidInput, match="no trainable parameter"):
        GLCAdapter(feature_module=nn.Identity(), classifier=classifier, config=SMALL).fit(x)
    head = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(InvalidInput, match="LEAD's labels need the weight"):
        GLCAdapter(feature_module=module, classifier=head, config=replace(SMALL, labeling=LeadConfig())).fit(x)
    with pytest.raises(InvalidInput, match="class_number"):
        AdaptConfig(class_number=1)
    with pytest.raises(InvalidInput, match="batch_size >= 2"):
        AdaptConfig(batch_size=1)


def test_slow_parameters_learn_at_a_tenth_and_the_rate_decays_as_published(world):
    module, _, _, _ = world
    optimizer = sgd_with_slow_part(module, lr=0.01, slow_prefixes=("0.",), slow_factor=0.1, momentum=0.9, weight_decay=1e-3)
    set_learning_rate(optimizer, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.01])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01 * 6**-0.75)


def test_refreshed_statistics_are_those_of_the_target(world):
    _, _, x, _ = world
    norm = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5))
    refresh_batch_norm(norm, x, batch_size=50)
    torch.testing.assert_close(norm[0].running_mean, x.mean(0), atol=1e-4, rtol=1e-4)
    assert norm[0].momentum == 0.1
    refresh_batch_norm(nn.Linear(2, 2), x)  # nothing to do


def test_prediction_of_nothing_is_empty(world):
    module, classifier, x, _ = world
    adapted = GLCAdapter(feature_module=module, classifier=classifier, config=replace(SMALL, epochs=1)).fit(x[:64])
    assert adapted.predict(x[:0]).classes.shape == (0,)


def test_the_example_of_the_page_runs(capsys):
    page = (Path(upcycle3d.__file__).parent / "docs" / "adapt.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "GLCAdapter(" in block)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/adapt.md", "exec"), names)
    assert names["found"].classes.shape == (400,)
    assert "tensor" in capsys.readouterr().out
