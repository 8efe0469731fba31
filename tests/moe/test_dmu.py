"""Diversified multiplet upcycling: stages train FFNs alone from the base, batches are pure, jobs resume, and the mixture loses nothing."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput, NonFiniteValue
from upcycle3d.core.tensor_file import CorruptFile
from upcycle3d.perception.moe.contrastive.dmu import dmu, gather_experts, plan_dmu, train_routers
from upcycle3d.perception.moe.contrastive.dmu_files import OtherJob
from upcycle3d.perception.moe.contrastive.expert_stages import DmuConfig, expert_stage, stage_groups, with_ffns
from upcycle3d.perception.moe.contrastive.loss import LogitScale
from upcycle3d.perception.moe.contrastive.pair_training import PairTraining, encode_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairBatch, PairTensors, SharedTower, TwoTowers
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.upcycling.clusters import AccumulatedLabels, ClusterConfig, merge_small


class TokenTower(nn.Module):
    """Blocks and the mean of the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(look.Block(look.ClipMlp()), look.Block(look.TimmMlp(drop=(0.0, 0.0))))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        if padding is None:
            return self.blocks(x).mean(1)
        x = self.blocks[0](x * ~padding[..., None])  # attention over zeros: the same numbers whatever stands in the padding
        x = self.blocks[1](x * ~padding[..., None])
        return (x * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True)


def towers(seed: int = 0) -> TwoTowers:
    torch.manual_seed(seed)
    return TwoTowers(TokenTower(), TokenTower(), nn.Linear(12, 6), nn.Linear(12, 6), logit_scale=LogitScale(10.0))


def pairs(count: int = 60, seed: int = 1) -> PairTensors:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 12, generator=draw)
    text = image[:, :2] + 0.3 * torch.randn(count, 2, 12, generator=draw)
    return PairTensors(image=image, text=text, caption=torch.arange(count) // 2)


def config(**more) -> DmuConfig:
    training = PairTraining(steps=3, batch_size=8, lr=1e-2, warmup=0)
    few = ClusterConfig(image_clusters=2, text_clusters=2, seeds=1)
    return replace(DmuConfig(expert=training, router=training, stages=2, clusters=few), **more)


@dataclass(frozen=True)
class Watched:
    """Pairs that remember which batches were read."""

    inner: PairTensors
    batches: list[list[int]] = field(default_factory=list)

    @property
    def caption(self) -> Tensor:
        return self.inner.caption

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, rows: Tensor) -> PairBatch:
        self.batches.append(rows.tolist())
        return self.inner.batch(rows)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def test_only_ffns_change_in_a_stage_and_the_mixture_holds_base_and_stages_bit_by_bit():
    base, data = towers(), pairs()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    result = dmu(base, data, config())
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    plan = result.upcycled.plan
    of_ffns = {name for site in plan.sites for name in site.tensors}
    assert len(plan.sites) == 4
    for stage in result.stages:
        assert set(stage.ffns) == of_ffns
        assert all(not torch.equal(stage.ffns[name], before[name]) for name in of_ffns if name.endswith("weight"))
    after = tensors_of(result.upcycled.model)
    rest = [name for name in before if name not in of_ffns]
    assert rest
    assert all(torch.equal(before[name], after[name]) for name in rest)
    layers = dict(moe_layers(result.upcycled.model))
    for site in plan.sites:
        for number, source in enumerate([before, *(stage.ffns for stage in result.stages)]):
            wanted, found = site.read(source).tensors(), layers[site.name].bank.to_dense(number).tensors()
            assert wanted.keys() == found.keys()
            assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_every_stage_starts_from_the_base_and_only_the_clusters_are_chained():
    base, data, settings = towers(), pairs(), config()
    result = dmu(base, data, settings)
    first, second = result.stages
    again = expert_stage(base, result.upcycled.plan, data, second.labels, [first.labels], settings, 2)
    assert all(torch.equal(again.ffns[name], tensor) for name, tensor in second.ffns.items())
    from_first = with_ffns(base, first.ffns)
    other = expert_stage(from_first, result.upcycled.plan, data, second.labels, [first.labels], settings, 2)
    assert not all(torch.equal(other.ffns[name], tensor) for name, tensor in second.ffns.items())


def test_batches_are_pure_and_labels_refine():
    data = Watched(pairs(80))
    settings = config()
    result = dmu(towers(), data, settings)
    labels = AccumulatedLabels.first(result.stages[0].labels, 4)
    group = [merge_small(labels, 8).group, merge_small(labels.then(result.stages[1].labels), 8).group]
    fine = labels.then(result.stages[1].labels).code
    for cluster in fine.unique():
        assert len(labels.code[fine == cluster].unique()) == 1
    training = [rows for rows in data.batches if len(rows) == 8]
    for stage in range(2):
        for rows in training[3 * stage : 3 * stage + 3]:
            assert len(group[stage][torch.tensor(rows)].unique()) == 1
    assert len(training) == 9


def test_accumulation_and_pure_batches_can_be_turned_off():
    labels = [torch.arange(64) % 4, torch.arange(64) // 16]
    group, clusters, _ = stage_groups(labels, config(expert=PairTraining(steps=1, batch_size=4)))
    assert clusters == 16
    assert len(group.unique()) == 16
    _, clusters, _ = stage_groups(labels, config(accumulate=False))
    assert clusters == 4
    group, _, _ = stage_groups(labels, config(pure_batches=False))
    assert not group.any()
    watched = Watched(pairs())
    result = dmu(towers(), watched, config(pure_batches=False))
    assert result.encoding_cpu_seconds == 0
    assert all(len(rows) == 8 for rows in watched.batches)


def test_small_clusters_are_merged_left_out_or_refused():
    labels = [torch.tensor([0] * 30 + [1] * 30 + [2] * 4)]
    group, _, moved = stage_groups(labels, config())
    assert moved == 34
    assert int(torch.bincount(group).min()) >= 8
    group, _, _ = stage_groups(labels, config(small_clusters="leave_out"))
    assert torch.bincount(group).tolist() == [30, 30, 4]
    with pytest.raises(InvalidInput, match="1 of 3 clusters are smaller than a batch of 8, 4 pairs"):
        stage_groups(labels, config(small_clusters="refuse"))
    with pytest.raises(InvalidInput, match="do not fill a batch of 8"):
        stage_groups([labels[0][-5:]], config())


def test_untrained_experts_leave_the_base_as_it_is():
    base, data = towers(), pairs()
    still = PairTraining(steps=1, batch_size=8, lr=0.0)
    result = dmu(base, data, config(expert=still))
    was, now = encode_pairs(base, data), encode_pairs(result.upcycled.model, data)
    torch.testing.assert_close(now.image, was.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(now.text, was.text, rtol=0, atol=1e-5)


def test_the_router_stage_changes_routers_alone_and_says_what_it_does():
    base, data, settings = towers(), pairs(), config()
    plan = plan_dmu(base, settings)
    stages = [expert_stage(base, plan, data, torch.arange(60) % 2, [], settings, 1) for _ in range(2)]
    made = gather_experts(base, [stage.ffns for stage in stages], plan, settings)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    lines: list[str] = []
    report = train_routers(made, data, settings, say=lines.append)
    changed = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".router." in name}
    assert len(report.balances) == 3
    assert report.trained == 4 * 3 * 12
    assert "balance 0.01" in lines[0]
    assert "on 4 of 4 layers" in lines[0]
    assert "entropy of the experts' use" in lines[1]


def test_a_stopped_job_goes_on_and_ends_like_one_that_was_not_stopped(tmp_path):
    base, settings = towers(), config()
    whole = dmu(base, pairs(), settings)

    def stop(line: str) -> None:
        if line.startswith("stage 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dmu(base, pairs(), settings, folder=tmp_path, say=stop)
    watched = Watched(pairs())
    resumed = dmu(base, watched, settings, folder=tmp_path)
    assert len(watched.batches) == 3  # the routers' alone
    assert all(
        torch.equal(tensor, resumed.upcycled.model.state_dict()[name])
        for name, tensor in whole.upcycled.model.state_dict().items()
    )
    assert resumed.stages[0].report.losses == whole.stages[0].report.losses
    third = Watched(pairs())
    finished = dmu(base, third, settings, folder=tmp_path)
    assert not third.batches
    assert finished.router.losses == whole.router.losses
    assert finished.encoding_cpu_seconds > 0


def test_other_options_of_the_routers_keep_the_experts_and_another_job_is_refused(tmp_path):
    base, data, settings = towers(), pairs(), config()
    dmu(base, data, settings, folder=tmp_path)
    watched = Watched(data)
    dmu(base, watched, replace(settings, router=replace(settings.router, lr=1e-3)), folder=tmp_path)
    assert len(watched.batches) == 3
    watched = Watched(data)
    more = dmu(base, watched, replace(settings, stages=3), folder=tmp_path)  # one more expert
    assert len(watched.batches) == 1 + 3 + 3
    assert more.upcycled.plan.experts == 4
    with pytest.raises(OtherJob, match="another job"):
        dmu(base, data, replace(settings, expert=replace(settings.expert, lr=1e-3)), folder=tmp_path)
    with pytest.raises(OtherJob, match="another job"):
        dmu(towers(5), data, settings, folder=tmp_path)
    with pytest.raises(OtherJob, match="another job"):
        dmu(base, pairs(seed=9), settings, folder=tmp_path)


def test_a_damaged_stage_is_refused(tmp_path):
    base, data, settings = towers(), pairs(), config()
    dmu(base, data, settings, folder=tmp_path)
    path = tmp_path / "expert1.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="computes the stage again"):
        dmu(base, data, settings, folder=tmp_path)


def test_what_cannot_be_upcycled_is_refused_with_a_reason():
    data = pairs()
    linear = TwoTowers(nn.Sequential(nn.Flatten(), nn.Linear(36, 6)), nn.Sequential(nn.Flatten(), nn.Linear(24, 6)))
    with pytest.raises(InvalidInput, match="found no FFN to replace"):
        dmu(linear, data, config())
    broken = towers()
    with torch.no_grad():
        broken.image.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"fc1\.weight' holds NaN"):
        dmu(broken, data, config())
    data.image[7] = float("nan")
    with pytest.raises(NonFiniteValue, match="first that of pair 7"):
        dmu(towers(), data, config())
    with pytest.raises(InvalidInput, match="k = 4 of 3"):
        config(rule=TopKRule(k=4, norm="renorm"))
    with pytest.raises(InvalidInput, match="clusters"):
        dmu(towers(), pairs(1), config(expert=PairTraining(steps=1, batch_size=1)))


def test_padding_changes_neither_losses_nor_counts_nor_balance():
    base, settings = towers(), config(stages=1, rule=TopKRule(k=1, norm="none"))
    plain = pairs()
    wider = torch.cat([plain.text, torch.full((60, 3, 12), 7.0)], dim=1)
    mask = torch.tensor([False, False, True, True, True]).expand(60, 5)
    # A wide batch keeps its padding when one caption is longer; here one pair fills every column.
    long = torch.cat([mask[:59], torch.zeros(1, 5, dtype=torch.bool)])
    found = []
    for text, padding in ((plain.text, None), (wider, mask), (wider, long)):
        data = PairTensors(image=plain.image, text=text, caption=plain.caption, text_padding=padding)
        plan = plan_dmu(base, settings)
        stage = expert_stage(base, plan, pairs(), torch.zeros(60, dtype=torch.int64), [], settings, 1)
        made = gather_experts(base, [stage.ffns], plan, settings)
        encode_pairs(made.model, data)
        found.append({name: layer.usage.value.tokens for name, layer in moe_layers(made.model)})
    text_layers = [name for name in found[0] if name.startswith("text")]
    assert all(found[1][name] == found[0][name] == 120 for name in text_layers)
    assert all(found[2][name] == 59 * 2 + 5 for name in text_layers)


def test_regions_of_a_detector_learn_from_two_views():
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    view = torch.randn(64, 12, 4, generator=draw)
    data = PairTensors(
        image=view + 0.1 * torch.randn(view.shape, generator=draw),
        text=view + 0.1 * torch.randn(view.shape, generator=draw),
        caption=torch.arange(64),
    )
    head = look.region_head()
    head.eval()
    base = SharedTower(head, nn.Linear(28, 8), logit_scale=LogitScale(10.0))
    result = dmu(base, data, config(stages=1))
    assert result.upcycled.plan.sites[0].channel_dim == -2
    assert encode_pairs(result.upcycled.model, data).image.shape == (64, 8)
    assert not torch.equal(*(layer.bank.down_proj[e] for _, layer in moe_layers(result.upcycled.model) for e in (0, 1)))


def test_lists_of_stages_must_fit_the_plan():
    base, settings = towers(), config()
    plan = plan_dmu(base, settings)
    with pytest.raises(InvalidInput, match="1 stages and the base make 2 experts, and the plan has 3"):
        gather_experts(base, [{}], plan, settings)
    with pytest.raises(InvalidInput, match="does not fit the base model"):
        with_ffns(base, {"nothing": torch.zeros(2)})
