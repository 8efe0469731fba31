"""Upcycled heads on detectors: exact with equal experts, complete, stored as typed configuration, and trained from smashed scenes."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.decoders.mixture import HeadMixtureConfig, MixtureDecoder
from upcycle3d.perception.models.decoders.scene_blocks import SceneBlockMixture
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.upcycled import UpcycledDetectorConfig
from upcycle3d.perception.moe.detectors.calibrate import fit_gate, fit_gate_to_groups, recalibrate_head
from upcycle3d.perception.moe.detectors.upcycle import upcycle_head
from upcycle3d.perception.moe.layers.control_routers import given_domains
from upcycle3d.perception.moe.layers.losses import RouterLossConfig
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.training.detector_files import load_detector, save_detector, save_run_detector
from upcycle3d.perception.wire.encoder_file import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("clear", "rain", "fog")
NO_LOSSES = RouterLossConfig(balance=0.0)
HEADS = {
    "branches": HeadMixtureConfig(experts=NAMES),
    "branches per scene": HeadMixtureConfig(experts=NAMES, decides_per="scene"),
    "all, shared norms": HeadMixtureConfig(experts=NAMES, regions="all", batch_norm="share"),
    "bev": HeadMixtureConfig(experts=NAMES, regions="none", bev_blocks=(1,)),
    "everything, shared norms": HeadMixtureConfig(
        experts=NAMES, regions="all", bev_blocks=(0, 1), decides_per="scene", batch_norm="share"
    ),
    "soft": HeadMixtureConfig(experts=NAMES, router="soft", bev_blocks=(1,)),
    "oracle": HeadMixtureConfig(experts=NAMES, router="oracle", decides_per="scene", bev_blocks=(0,), losses=NO_LOSSES),
}
FRAMES = [tiny.frame_with_car(seed) for seed in range(3)]
SCANS = [frame.points for frame in FRAMES]
LABELS = [frame.labels for frame in FRAMES]


def trained(make=tiny.second_iou) -> Detector:
    """A detector whose batch norms have seen data, so that folding them matters."""
    detector = make()
    with torch.no_grad():
        for _ in range(3):
            detector.loss(detector.decode(detector.encode(SCANS), LABELS), LABELS)
    return detector.eval()


def specialists(dense: Detector, number: int = 3) -> list[Detector]:
    """Copies of a detector whose decoders went apart a little; the encoders stay equal."""
    made = []
    for seed in range(number):
        torch.manual_seed(seed)
        twin = copy.deepcopy(dense)
        with torch.no_grad():
            for parameter in twin.decoder.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        made.append(twin)
    return made


def found(detector: Detector) -> list[torch.Tensor]:
    return [torch.cat([p.boxes.data, p.scores[:, None], p.classes[:, None]], 1) for p in detector.detect(SCANS)]


def assert_equal_detections(one: Detector, other: Detector) -> None:
    for a, b in zip(found(one), found(other), strict=True):
        assert len(a)
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=2e-5)


@pytest.fixture(scope="module")
def second_iou() -> Detector:
    return trained()


@pytest.fixture(scope="module")
def pv_rcnn() -> Detector:
    return trained(tiny.pv_rcnn)


# ---- structure


@pytest.mark.parametrize("kind", HEADS)
def test_equal_experts_find_what_the_dense_detector_finds(second_iou, kind):
    head = HEADS[kind]
    made = upcycle_head([second_iou] * 3, head).detector
    if head.router == "oracle":
        with given_domains(made, torch.tensor([2, 0, 1])):
            assert_equal_detections(made, second_iou)
    else:
        assert_equal_detections(made, second_iou)
    assert encoder_fingerprint(made.encoder, RigSpec()) == encoder_fingerprint(second_iou.encoder, RigSpec())


@pytest.mark.parametrize("kind", ["branches", "everything, shared norms"])
def test_the_map_of_equal_experts_is_that_of_the_dense_detector(second_iou, kind):
    """What estimates object sizes looks at the map; outside of a forward pass nothing has decided for the scene yet."""
    made = upcycle_head([second_iou] * 3, HEADS[kind]).detector
    with torch.no_grad():
        features = second_iou.encode(SCANS)
        torch.testing.assert_close(made.decoder.bev_map(features), second_iou.decoder.bev_map(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["branches", "everything, shared norms"])
def test_pv_rcnn_too(pv_rcnn, kind):
    made = upcycle_head([pv_rcnn] * 3, HEADS[kind]).detector
    assert_equal_detections(made, pv_rcnn)
    names = [name for name, _ in moe_layers(made.decoder)]
    assert {"cls_layers" in n or "reg_layers" in n or "shared_fc" in n for n in names} == {True}
    assert any("reg_layers" in name for name in names)


def test_costs_are_those_of_the_layers_that_run(second_iou):
    """Multiply-adds against a count by the sizes of the maps and regions that really pass the layers."""
    head = replace(HEADS["branches per scene"], bev_blocks=(1,), k=1, norm="none")
    made = upcycle_head(specialists(second_iou), head)
    seen = {}

    def count(name):
        def look(layer, inputs, output):
            cells = output[0, 0].numel() if output.ndim == 4 else 1
            seen[name] = seen.get(name, 0) + layer.weight.numel() * cells

        return look

    block = second_iou.decoder.bev_backbone.blocks[1]
    hooks = [conv.register_forward_hook(count("block")) for conv in block if isinstance(conv, torch.nn.Conv2d)]
    second_iou.detect(SCANS[0])
    for hook in hooks:
        hook.remove()
    costs = {part.part: part for part in made.costs}
    assert costs["BEV block 1"].multiply_adds == (seen["block"], seen["block"])
    assert costs["BEV block 1"].parameters[0] == sum(p.numel() for p in block.parameters())
    assert costs["gate"].parameters[1] == sum(p.numel() for p in made.detector.decoder.gate.parameters())
    ffns = [layer.bank for _, layer in moe_layers(made.detector.decoder)]
    matrices = sum(w[0].numel() for bank in ffns for w in bank.parameters() if w.ndim == 3)
    assert costs["branches of the region head"].multiply_adds == (matrices, matrices)
    assert sum(part.parameters[1] for part in made.costs) == sum(p.numel() for p in made.detector.decoder.parameters())
    twice = upcycle_head(specialists(second_iou), replace(head, k=2, norm="renorm"))
    assert [part.multiply_adds[1] for part in twice.costs[:2]] == [2 * matrices, 2 * seen["block"]]


def test_an_oracle_gives_each_scene_its_own_specialist(second_iou):
    """With the seed's rest, expert e serves a scene exactly as the seed would with the layers of specialist e."""
    apart = specialists(second_iou)
    head = HEADS["oracle"]
    made = upcycle_head(apart, head, rest="seed", seed=second_iou).detector
    replaced = ("roi_head.iou_layers.0", "roi_head.iou_layers.1", "roi_head.iou_layers.4", "roi_head.iou_layers.5")
    wanted = []
    for one in apart:
        twin = copy.deepcopy(second_iou)
        state = {n: v for n, v in one.decoder.state_dict().items() if n.startswith((*replaced, "bev_backbone.blocks.0."))}
        twin.decoder.load_state_dict(state, strict=False)
        wanted.append(twin)
    order = torch.tensor([2, 0, 1])
    with given_domains(made, order):
        mixed = found(made)
    for scene, expert in enumerate(order.tolist()):
        assert torch.allclose(mixed[scene], found(wanted[expert])[scene], atol=2e-5)
    first, last = found(wanted[0])[0], found(wanted[2])[0]
    assert len(first) != len(last) or not torch.allclose(first, last, atol=2e-5)


def test_everything_else_is_averaged_and_every_tensor_is_accounted_for(second_iou):
    apart = specialists(second_iou)
    made = upcycle_head(apart, HEADS["branches"])
    name = "anchor_head.conv_box.weight"
    mean = torch.stack([one.decoder.state_dict()[name] for one in apart]).mean(0)
    assert torch.allclose(made.detector.decoder.state_dict()[f"decoder.{name}"], mean, atol=1e-7)
    assert len(made.account.read) == 3 * len(apart[0].decoder.state_dict())
    assert len(made.account.written) == len(made.detector.decoder.state_dict())
    assert made.parameters[1] > made.parameters[0]
    assert made.active[0] > 0


def test_the_routers_are_drawn_from_a_number(second_iou):
    def gate(draw):
        return upcycle_head([second_iou] * 3, HEADS["bev"], draw=draw).detector.decoder.gate.weight

    assert torch.equal(gate(1), gate(1))
    assert not torch.equal(gate(1), gate(2))


def test_specialists_that_cannot_share_a_head_are_refused_with_the_reason(second_iou, pv_rcnn):
    head = HEADS["branches"]
    with pytest.raises(InvalidInput, match=r"3 experts \(clear, rain, fog\), and 2 specialists were given"):
        upcycle_head([second_iou] * 2, head)
    moved = copy.deepcopy(second_iou)
    with torch.no_grad():
        next(moved.encoder.parameters()).add_(1e-6)
    with pytest.raises(InvalidInput, match=r"the encoders of clear and fog differ in 1 of .* with a frozen encoder"):
        upcycle_head([second_iou, second_iou, moved], head)
    stranger = tiny.second_iou(seed=7)
    stranger.encoder.load_state_dict(second_iou.encoder.state_dict())
    with pytest.raises(InvalidInput, match="do not come from one seed"):
        upcycle_head([second_iou, second_iou, stranger], head)
    with pytest.raises(InvalidInput, match="different architectures: kind: clear 'SecondIouDetectorConfig', rain 'PvRcnn"):
        upcycle_head([second_iou, pv_rcnn, second_iou], head)
    other = tiny.second_iou(tiny.second_iou_config(width=8))
    with pytest.raises(InvalidInput, match=r"different architectures: encoder\.channels"):
        upcycle_head([second_iou, second_iou, other], head)
    made = upcycle_head([second_iou] * 3, head).detector
    with pytest.raises(InvalidInput, match="clear has an upcycled head already"):
        upcycle_head([made] * 3, head)
    with pytest.raises(InvalidInput, match="no seed was given"):
        upcycle_head([second_iou] * 3, head, rest="seed")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 4}, "cannot choose k = 4 of 3 experts"),
        ({"regions": "none"}, "this head has no mixture"),
        ({"k": 1}, "always weighs its expert by 1"),
        ({"router": "oracle"}, 'set decides_per = "scene"'),
        ({"router": "uniform"}, "a uniform router learns nothing"),
        ({"bev_blocks": (2,)}, "has the blocks 0 and 1"),
        ({"experts": ("a", "a", "b")}, "each needs a name of its own"),
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(InvalidInput, match=said):
        replace(HEADS["branches"], **changes)


# ---- files


@pytest.mark.parametrize("kind", HEADS)
def test_a_file_gives_the_head_back_bit_for_bit(second_iou, tmp_path, kind):
    made = upcycle_head(specialists(second_iou), HEADS[kind]).detector
    save_run_detector(tmp_path, made)
    loaded = load_detector(tmp_path)
    assert isinstance(loaded.config, UpcycledDetectorConfig)
    assert (loaded.config, loaded.label) == (made.config, "SECOND-IoU with 3 experts")
    mine, theirs = made.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    encoder = load_encoder(tmp_path)
    assert encoder_fingerprint(encoder, RigSpec()) == encoder_fingerprint(second_iou.encoder, RigSpec())


def test_weights_of_another_structure_are_refused(second_iou, tmp_path):
    made = upcycle_head([second_iou] * 3, HEADS["branches"]).detector
    made.config = replace(made.config, head=HEADS["bev"])
    save_detector(tmp_path / "wrong.safetensors", made)
    with pytest.raises(InvalidInput, match=r"do not fit Detector .*\n.*missing decoder\.descriptor"):
        load_detector(tmp_path / "wrong.safetensors")


# ---- training


def labeled(step: int):
    return FRAMES[step % 3], FRAMES[(step + 1) % 3]


@pytest.mark.parametrize("kind", ["branches per scene", "everything, shared norms", "soft"])
def test_upcycling_from_smashed_scenes_changes_every_expert_that_was_chosen(second_iou, tmp_path, kind):
    """No raw point of the fleet is there: the experts learn from a store of smashed scenes, and the encoder keeps its fingerprint."""
    head = HEADS[kind]
    student = upcycle_head([second_iou] * 3, head, router_std=0.5).detector
    store = tiny.store(tmp_path, second_iou, [tiny.frame_with_car(seed).points for seed in (10, 11, 12)])
    before = copy.deepcopy(student)
    config = tiny.upcycle_config(steps=3)
    upcycle(student, method=METHODS["hybrid"], labeled=labeled, store=store, pasted_objects=None, config=config, progress=False)
    assert encoder_fingerprint(student.encoder, RigSpec()) == encoder_fingerprint(second_iou.encoder, RigSpec())
    decoder = student.decoder
    assert isinstance(decoder, MixtureDecoder)
    used = decoder.gate_usage.value.use
    for (_, old), (name, new) in zip(moe_layers(before), moe_layers(student), strict=True):
        use = used if head.decides_per == "scene" else new.usage.value.use
        moved = [not torch.equal(old.bank.up_proj[e], new.bank.up_proj[e]) for e in range(3)]
        assert moved == [u > 0 for u in use], name
    for layer, twin in zip(blocks(student), blocks(before), strict=True):
        moved = [not torch.equal(layer.experts[e][0].weight, twin.experts[e][0].weight) for e in range(3)]
        assert moved == [u > 0 for u in used]


def blocks(detector: Detector) -> list[SceneBlockMixture]:
    return [module for module in detector.modules() if isinstance(module, SceneBlockMixture)]


def test_the_router_losses_join_the_training_loss_and_train_the_gate(second_iou):
    made = upcycle_head(specialists(second_iou), HEADS["branches per scene"], router_std=0.5).detector.train()
    made.freeze_encoder()
    terms = made.loss(made.decode(made.encode(SCANS), LABELS), LABELS)
    assert terms.terms["router_balance"].item() == pytest.approx(0.01, rel=1.0)
    terms.total().backward()
    assert made.decoder.gate.weight.grad.abs().sum() > 0
    for router in made.decoder.routers():
        router.requires_grad_(False)
    assert "router_balance" not in made.loss(made.decode(made.encode(SCANS), LABELS), LABELS).terms


def test_scenes_without_a_region_or_a_cell_pass(second_iou):
    made = upcycle_head([second_iou] * 3, HEADS["everything, shared norms"]).detector
    assert [len(p.scores) for p in made.detect([tiny.NO_POINTS, tiny.NO_POINTS])] == [0, 0]
    assert len(made.detect([SCANS[0], tiny.NO_POINTS])) == 2


def test_a_scene_is_decided_alone_and_the_same_in_any_batch(second_iou):
    made = upcycle_head(specialists(second_iou), HEADS["everything, shared norms"], router_std=0.5).detector
    together = found(made)
    for scan, wanted in zip(SCANS, together, strict=True):
        one = made.detect(scan)
        assert torch.allclose(one.scores, wanted[:, 7], atol=2e-5)


# ---- what depends on data


def test_the_gate_starts_at_the_domains_and_batch_norms_are_measured_again(second_iou):
    made = upcycle_head([second_iou] * 3, HEADS["everything, shared norms"]).detector
    sparse = [tiny.scan_with_car(seed, road=20) for seed in range(4)]
    dense = [tiny.scan_with_car(seed, road=2000) for seed in range(4)]
    empty = [tiny.scan_with_car(seed, boxes=torch.zeros(0, 7)) for seed in range(4)]
    domains = [[made.encode(scans)] for scans in (sparse, dense, empty)]
    fit_gate(made, domains)
    decoder = made.decoder
    for expert, scans in enumerate((sparse, dense, empty)):
        assert decoder.decide(made.encode(scans)).top1.tolist() == [expert] * 4
    before = copy.deepcopy(made)
    assert recalibrate_head(made, [batch for domain in domains for batch in domain]) > 0
    changed = {n for n, v in made.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    assert not any(name.startswith("encoder.") for name in changed)
    made = upcycle_head([second_iou] * 3, HEADS["bev"]).detector
    sizes = fit_gate_to_groups(made, [batch for domain in domains for batch in domain])
    assert sum(sizes) == 12
    chosen = made.decoder.decide(made.encode([*sparse, *dense, *empty])).top1
    assert torch.bincount(chosen, minlength=3).tolist() == list(sizes)
    with pytest.raises(InvalidInput, match="the scenes of clear and rain look the same"):
        fit_gate(made, [domains[0], domains[0], domains[1]])
    with pytest.raises(InvalidInput, match="found 2"):
        fit_gate(made, domains[:2])
