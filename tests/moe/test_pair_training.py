"""Training of pairs moves what the stage says; retrieval is counted like a plain loop counts it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from upcycle3d.core.errors import InvalidInput, NonFiniteValue
from upcycle3d.perception.moe.contrastive.loss import LogitScale
from upcycle3d.perception.moe.contrastive.pair_training import PairEmbeddings, PairTraining, encode_pairs, recall, train_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairBatch, PairTensors, TwoTowers
from upcycle3d.perception.moe.contrastive.stages import MixtureParts

PARTS = MixtureParts(ffn=("image.1", "text.1"), router=("image.0",))


def model(seed: int = 0) -> TwoTowers:
    torch.manual_seed(seed)
    encoder = [nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    return TwoTowers(*encoder, logit_scale=LogitScale(20.0, learned=True))


def data(count: int = 40) -> PairTensors:
    draw = torch.Generator().manual_seed(3)
    image = torch.randn(count, 5, generator=draw)
    return PairTensors(image=image, text=image + 0.2 * torch.randn(count, 5, generator=draw), caption=torch.arange(count))


def run(towers: TwoTowers, training: PairTraining, pairs: PairTensors | None = None, **more):
    pairs = data() if pairs is None else pairs
    return train_pairs(towers, pairs, torch.zeros(len(pairs), dtype=torch.int64), training, "ffn", PARTS, **more)


def test_training_lowers_the_loss_and_leaves_the_rest_alone():
    towers = model()
    before = {name: tensor.clone() for name, tensor in towers.state_dict().items()}
    report = run(towers, PairTraining(steps=60, batch_size=20, lr=1e-2, warmup=5, label_smoothing=0.0))
    assert report.last < report.first
    assert len(report.losses) == 60
    changed = {name for name, tensor in towers.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"image.1.weight", "image.1.bias", "text.1.weight", "text.1.bias"}
    assert report.trained == 2 * (8 * 4 + 4)


def test_a_run_depends_on_its_seed_alone():
    training = PairTraining(steps=4, batch_size=10, lr=1e-2)
    torch.manual_seed(11)
    first = run(model(), training, seed=5).losses
    torch.manual_seed(12)
    assert run(model(), training, seed=5).losses == first
    assert run(model(), training, seed=6).losses != first


def test_equal_captions_are_no_negatives():
    pairs = data()
    same = PairTensors(image=pairs.image, text=pairs.text, caption=torch.zeros(40, dtype=torch.int64))
    masked = run(model(), PairTraining(steps=2, batch_size=10), same)
    assert masked.losses == (0.0, 0.0)
    counted = run(model(), PairTraining(steps=2, batch_size=10, mask_equal_captions=False), same)
    assert min(counted.losses) > 0.1


def test_the_rate_rises_then_falls_to_zero():
    training = PairTraining(steps=10, batch_size=2, lr=1.0, warmup=2)
    rates = [training.lr_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[9] < 0.05
    assert PairTraining(steps=3, batch_size=2, warmup=200).lr_at(2) == pytest.approx(1e-5)


def test_a_loss_that_is_no_number_stops_the_training():
    towers = model()
    pairs = data()
    pairs.text[:] = float("inf")
    with pytest.raises(NonFiniteValue, match="at step 0; lower the learning rate"):
        run(towers, PairTraining(steps=2, batch_size=10), pairs)
    with pytest.raises(NonFiniteValue, match="text embeddings of 40 of 40 pairs"):
        encode_pairs(towers, pairs)


def test_a_balance_coefficient_without_routers_is_refused():
    from upcycle3d.perception.moe.layers.losses import RouterLossConfig

    with pytest.raises(InvalidInput, match="no layer kept a routing"):
        run(model(), PairTraining(steps=1, batch_size=10), router_loss=RouterLossConfig())


def test_embeddings_are_those_of_one_large_batch_in_evaluation_mode():
    towers, pairs = model(), data()
    found = encode_pairs(towers, pairs, batch_size=7)
    assert towers.training
    towers.eval()
    with torch.no_grad():
        image, text = towers(pairs.batch(torch.arange(40)))
    torch.testing.assert_close(found.image, F.normalize(image, dim=1))
    torch.testing.assert_close(found.text, F.normalize(text, dim=1))


def test_recall_is_what_a_loop_counts():
    draw = torch.Generator().manual_seed(0)
    caption = torch.randint(0, 9, (30,), generator=draw)
    words = F.normalize(torch.randn(9, 4, generator=draw), dim=1)
    image = F.normalize(words[caption] + 0.8 * torch.randn(30, 4, generator=draw), dim=1)
    found = recall(PairEmbeddings(image=image, text=words[caption]), caption, ks=(1, 3))
    different = sorted(set(caption.tolist()))
    for k in (1, 3):
        hits = 0
        for i in range(30):
            order = sorted(different, key=lambda c: -float(image[i] @ words[c]))
            hits += int(caption[i]) in order[:k]
        assert found.image_to_text[k] == pytest.approx(hits / 30)
        hits = 0
        for c in different:
            order = sorted(range(30), key=lambda i: -float(image[i] @ words[c]))
            hits += any(int(caption[i]) == c for i in order[:k])
        assert found.text_to_image[k] == pytest.approx(hits / len(different))


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = torch.ones(6, 2) / 2**0.5
    found = recall(PairEmbeddings(image=same, text=same), torch.arange(6))
    assert found.image_to_text == {1: 0.0, 5: 0.0}
    assert found.text_to_image == {1: 0.0, 5: 0.0}
    with pytest.raises(InvalidInput, match="same pairs"):
        recall(PairEmbeddings(image=same, text=same), torch.arange(5))


def test_pairs_refuse_what_does_not_belong_together():
    with pytest.raises(InvalidInput, match="one text per image"):
        PairBatch(image=torch.zeros(2, 3), text=torch.zeros(3, 3))
    with pytest.raises(InvalidInput, match="attention_mask == 0"):
        PairBatch(image=torch.zeros(2, 3), text=torch.zeros(2, 4), text_padding=torch.ones(2, 4))
    with pytest.raises(InvalidInput, match="as many images"):
        PairTensors(image=torch.zeros(2, 3), text=torch.zeros(2, 3), caption=torch.zeros(2))


def test_columns_of_padding_are_cut_off_but_no_token_is():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    pairs = PairTensors(image=torch.zeros(3, 1), text=torch.arange(12).view(3, 4), caption=torch.arange(3), text_padding=mask)
    short = pairs.batch(torch.tensor([1, 0]))
    assert short.text.tolist() == [[4, 5], [0, 1]]
    assert short.text_padding.tolist() == [[False, True], [False, False]]
    assert pairs.batch(torch.arange(3)).text.shape == (3, 3)
    assert pairs.fingerprint() != PairTensors(image=pairs.image, text=pairs.text, caption=pairs.caption).fingerprint()
