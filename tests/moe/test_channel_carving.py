"""Detectors carved by driving context: the masked form, the narrow form and plain zeros compute the same, and the encoder stays."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.decoders.channels import channel_sites, keep_channels
from upcycle3d.perception.models.detector import Detector, unwatched
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.narrow import KeptChannels, NarrowDetectorConfig
from upcycle3d.perception.moe.carving.activity import found_domains
from upcycle3d.perception.moe.carving.splits import pooled_units, random_units, readme_split, wrong_domain
from upcycle3d.perception.moe.driving.channel_carving import (
    ChannelActivity,
    ChannelCarving,
    context_tensors,
    decoder_multiply_adds,
    in_contexts,
    masked_detector,
    measure_channels,
    narrow_detector,
)
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = [tiny.frame_with_car(seed) for seed in range(4)]
SCANS = [frame.points for frame in FRAMES]
LABELS = [frame.labels for frame in FRAMES]
CONTEXTS = ("near", "far")


def detector_of(kind: str) -> Detector:
    """A tiny detector whose batch norms have statistics and values of their own, so that a wrong slice shows."""
    made = {"second_iou": tiny.second_iou, "pv_rcnn": tiny.pv_rcnn}[kind]().eval()
    draw = torch.Generator().manual_seed(5)
    for module in made.decoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight, 0.5), (module.bias, -0.1)):
                value.data.copy_(low + torch.rand(value.shape, generator=draw))
    return made


def activity_of(detector: Detector, **parts) -> ChannelActivity:
    scenes = {name: [detector.encode([scan]) for scan in SCANS[2 * i : 2 * i + 2]] for i, name in enumerate(CONTEXTS)}
    return measure_channels(detector, scenes, least_tokens=1, **parts)


def carved(kind: str = "second_iou", ratio: float = 0.5) -> tuple[Detector, ChannelCarving]:
    """Units are drawn, because tiny scans of one road activate the same channels: contexts must differ for a mistake to show."""
    detector = detector_of(kind)
    return detector, random_units(activity_of(detector), ratio, seed=1)


def outputs_of(detector: Detector, scan) -> list[torch.Tensor]:
    """Every number that a decoder computes of a scan before boxes are chosen, and the proposals with their scores.

    All cells are filled: anchors over empty cells have equal scores, and rounding would choose among them.
    """
    features = detector.encode([scan])
    every = torch.cartesian_prod(*(torch.arange(n) for n in (1, *features.voxels.shape))).int()
    values = torch.rand(len(every), features.voxels.features.shape[1], generator=torch.Generator().manual_seed(len(scan)))
    features = replace(features, voxels=replace(features.voxels, coords=every, features=values))
    raw = detector.decode(features)
    found = detector.proposals(features)[0]
    return [raw.dense.class_logits, raw.dense.box_codes, found.detections.scores, found.detections.boxes.data]


def zeroed(detector: Detector, carving: ChannelCarving, context: int):
    """The oracle: a hook on each ReLU of the dense detector that writes zeros, unit by unit."""

    def hook(off):
        def write(module, x, y):
            y = y.clone()
            for unit in off:
                y[:, unit] = 0
            return y

        return write

    handles = []
    for site, units in zip(carving.sites, carving.units):
        off = [u for u in range(site.width) if not bool(units.with_shared[context, u])]
        handles.append(detector.decoder.get_submodule(site.activation).register_forward_hook(hook(off)))
    return handles


def test_the_units_of_a_decoder_are_those_that_one_convolution_reads():
    names = [(site.name, site.reader, site.width, site.tokens) for site in channel_sites(detector_of("second_iou").decoder)]
    assert names == [
        ("bev_backbone.blocks.0.1", "bev_backbone.blocks.0.4", 16, "scenes"),
        ("bev_backbone.blocks.1.1", "bev_backbone.blocks.1.4", 16, "scenes"),
        ("roi_head.shared_fc_layer.0", "roi_head.shared_fc_layer.4", 16, "regions"),
        ("roi_head.iou_layers.0", "roi_head.iou_layers.4", 16, "regions"),
        ("roi_head.iou_layers.4", "roi_head.iou_layers.7", 16, "regions"),
    ]
    decoder = detector_of("pv_rcnn").decoder
    assert {site.name.split(".")[1] for site in channel_sites(decoder, bev_blocks=())} == {
        "shared_fc_layer",
        "cls_layers",
        "reg_layers",
    }
    with pytest.raises(InvalidInput, match=r"has 2 BEV blocks, and \[2\] were named"):
        channel_sites(decoder, bev_blocks=(2,))
    with pytest.raises(InvalidInput, match="found no channels"):
        channel_sites(decoder, regions="none", bev_blocks=())


def test_activity_is_the_mean_size_of_each_channel_over_cells_and_regions():
    """The oracle repeats the layers of a block and of a chain by hand, for one context of two scenes."""
    detector = detector_of("second_iou")
    activity = activity_of(detector)
    decoder, total, cells = detector.decoder, torch.zeros(16, dtype=torch.float64), 0
    regions, number = torch.zeros(16, dtype=torch.float64), 0
    with torch.no_grad():
        for scan in SCANS[:2]:
            features = detector.encode([scan])
            bev = features.voxels.dense().flatten(1, 2)
            block = decoder.bev_backbone.blocks[0]
            hidden = torch.relu(block[2](block[1](block[0](bev))))
            total += hidden.abs().double().sum((0, 2, 3))
            cells += hidden[0, 0].numel()
            shared = detector.proposals(features)[0].features
            chain = decoder.roi_head.iou_layers
            regions += torch.relu(chain[1](chain[0](shared[..., None]))).double().sum((0, 2))
            number += len(shared)
    assert activity.domains == CONTEXTS
    assert int(activity.sites[0].tokens[0]) == cells
    assert int(activity.sites[3].tokens[0]) == number
    torch.testing.assert_close(activity.sites[0].mean[0], total / cells, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(activity.sites[3].mean[0], regions / number, rtol=1e-5, atol=1e-8)
    assert "5 sets of channels in 2 domains" in str(activity)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["second_iou", "pv_rcnn"])
def test_masked_narrow_and_zeroed_detectors_compute_the_same(kind, ratio):
    detector, carving = carved(kind, ratio)
    masked = masked_detector(detector, carving)
    for context in range(2):
        narrow = narrow_detector(detector, carving, context)
        again = narrow_detector(masked, carving, context)
        with torch.no_grad():
            for scan in SCANS[:2]:
                handles = zeroed(detector, carving, context)
                wanted = outputs_of(detector, scan)
                for handle in handles:
                    handle.remove()
                with in_contexts(masked, [context]):
                    there = outputs_of(masked, scan)
                for found in (there, outputs_of(narrow, scan), outputs_of(again, scan)):
                    for mine, theirs in zip(found, wanted, strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if ratio == 1.0:
        assert narrow.config == detector.config  # nothing is left out: it is the dense detector


def test_each_scene_of_a_batch_has_its_own_context():
    """A batch of four scenes in two contexts finds what the narrow detectors find scene by scene, regions included."""
    detector, carving = carved()
    masked, order = masked_detector(detector, carving), [1, 0, 0, 1]
    with in_contexts(masked, order):
        together = masked.detect(SCANS)
    for scan, context, found in zip(SCANS, order, together):
        alone = narrow_detector(detector, carving, context).detect(scan)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.boxes.data, alone.boxes.data, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInput, match="decides once per scene"):
        masked.detect(SCANS)


def test_gradients_reach_the_units_of_the_context_alone():
    """Units of the other context get a gradient of zero, and those of this context the gradient of the dense detector with zeros."""
    detector, carving = carved()
    masked = masked_detector(detector, carving).train()
    masked.freeze_encoder()
    features = masked.encode(SCANS[:2])
    with in_contexts(masked, [0, 0]):
        masked.loss(masked.decode(features, LABELS[:2]), LABELS[:2]).total().backward()
    site, units = carving.sites[1], carving.units[1].with_shared[0]
    grad = masked.decoder.get_submodule(site.reader).weight.grad
    assert float(grad[:, ~units].abs().max()) == 0
    assert float(grad[:, units].abs().amin((0, 2, 3)).max()) > 0
    handles = zeroed(detector.train().freeze_encoder(), carving, 0)
    detector.loss(detector.decode(features, LABELS[:2]), LABELS[:2]).total().backward()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(grad, detector.decoder.get_submodule(site.reader).weight.grad, rtol=1e-4, atol=1e-6)


def test_scenes_and_regions_may_be_none():
    """A scan without a point has no proposal of a car; a batch of no scene has no row at all."""
    detector, carving = carved()
    masked = masked_detector(detector, carving)
    empty = SCANS[0].select(torch.zeros(0, dtype=torch.int64))
    with in_contexts(masked, [0]), unwatched(masked):
        assert len(masked.detect([empty])[0]) == 0
    layer = masked.decoder.get_submodule(carving.sites[3].activation)
    masked.decoder.scene_decision.scene_of_region = None
    with in_contexts(masked, []):
        masked.decoder.scene_decision.note_regions(torch.zeros(0, 5, dtype=torch.bool))
        assert layer(torch.zeros(0, 16, 1)).shape == (0, 16, 1)
    narrow = narrow_detector(detector, carving, 0)
    assert narrow.decoder.roi_head.iou_logits(torch.zeros(0, 16)).shape == (0,)


def test_a_narrow_detector_is_smaller_and_has_an_ordinary_file(tmp_path):
    detector, carving = carved()
    narrow = narrow_detector(detector, carving, 1)
    counts = [sum(p.numel() for p in d.decoder.parameters()) for d in (narrow, detector)]
    assert narrow.decoder.bev_backbone.blocks[0][1].weight.shape[0] == 8
    assert counts[0] < 0.75 * counts[1]
    save_run_detector(tmp_path, narrow)
    loaded = load_detector(tmp_path)
    assert loaded.config == narrow.config
    assert loaded.label == "SECOND-IoU with fewer channels"
    mine, theirs = narrow.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert encoder_fingerprint(loaded.encoder, RigSpec()) == encoder_fingerprint(detector.encoder, RigSpec())
    same = narrow.detect(SCANS[0])
    assert torch.equal(loaded.detect(SCANS[0]).boxes.data, same.boxes.data)


def test_a_narrow_detector_computes_less():
    """The oracle counts the convolutions of both blocks by hand; the region head is left out, and half of the channels are kept."""
    detector = detector_of("second_iou")
    activity = activity_of(detector, regions="none")
    narrow = narrow_detector(detector, random_units(activity, 0.5, seed=0), 0)
    features = detector.encode([SCANS[0]])
    saved = decoder_multiply_adds(detector, features) - decoder_multiply_adds(narrow, features)
    cells = [h * w for h, w in ((16, 16), (8, 8))]  # the map of the tiny grid, at strides 1 and 2
    inputs = [detector.decoder.bev_backbone.blocks[b][1].in_channels for b in (0, 1)]
    assert saved == sum(n * 9 * (8 * c + 8 * 16) for n, c in zip(cells, inputs))


def test_contexts_differ_in_the_tensors_that_are_named_and_in_no_other():
    detector, carving = carved()
    near, far = (narrow_detector(detector, carving, context).state_dict() for context in (0, 1))
    differ = {name for name, value in near.items() if not torch.equal(value, far[name])}
    assert differ
    assert differ <= context_tensors(carving)
    assert {near[name].shape for name in near} == {far[name].shape for name in far}


def test_controls_differ_from_readme_in_the_choice_of_units_alone():
    activity = activity_of(detector_of("second_iou"))
    readme, pooled, drawn = readme_split(activity), pooled_units(activity), random_units(activity, seed=1)
    assert all(int(units.with_shared.sum(1).max()) == 8 for one in (readme, pooled, drawn) for units in one.units)
    assert (readme.experts, pooled.experts, pooled.number("far"), readme.number("far")) == (2, 1, 0, 1)
    wrong = wrong_domain(readme)
    assert torch.equal(wrong.units[0].with_shared[0], readme.units[0].with_shared[1])
    assert isinstance(wrong, ChannelCarving)
    assert "readme: 2 contexts (near, far), ratio 0.5" in str(readme)
    with pytest.raises(InvalidInput, match="there is no context 'fog'"):
        readme.number("fog")


def test_contexts_can_be_found_without_a_name():
    detector = detector_of("second_iou")
    scenes = {f"scene {i}": [detector.encode([scan])] for i, scan in enumerate(SCANS)}
    items = measure_channels(detector, scenes, least_tokens=1)
    found, groups = found_domains(items, 2, lambda rows, k: torch.tensor([0, 1, 0, 1]))
    assert isinstance(found, ChannelActivity)
    assert (found.domains, groups.tolist()) == (("cluster 0", "cluster 1"), [0, 1, 0, 1])
    both = items.sites[0].total[0] + items.sites[0].total[2]
    torch.testing.assert_close(found.sites[0].total[0], both)
    assert readme_split(found).experts == 2


def test_what_does_not_fit_is_refused():
    detector, carving = carved()
    other = tiny.second_iou(tiny.second_iou_config(width=8))
    with pytest.raises(InvalidInput, match="has 8 outputs and then a ReLU; the carving is of 16"):
        masked_detector(other, carving)
    with pytest.raises(InvalidInput, match="has 8 outputs"):
        narrow_detector(other, carving, 0)
    masked = masked_detector(detector, carving)
    with pytest.raises(InvalidInput, match="are chosen per scene already"):
        masked_detector(masked, carving)
    with pytest.raises(InvalidInput, match="is not carved"), in_contexts(detector, [0]):
        pass
    with pytest.raises(InvalidInput, match=r"lie in 2\.\.2, and there are 2 experts"), in_contexts(masked, [2]):
        pass
    narrow = narrow_detector(detector, carving, 0)
    with pytest.raises(InvalidInput, match="no configuration of a dense detector"):
        narrow_detector(narrow, carving, 0)
    with pytest.raises(InvalidInput, match="must be some of 16"):
        keep_channels(detector.decoder, {carving.sites[0]: torch.tensor([16])})
    config = NarrowDetectorConfig(detector=detector.config, kept=(KeptChannels(site="roi_head.nothing", count=1),))
    with pytest.raises(InvalidInput, match=r"has no channels 'roi_head\.nothing'"):
        config.build()
    with pytest.raises(InvalidInput, match="has 16 units, and 17 are to be left"):
        replace(config, kept=(KeptChannels(site=carving.sites[0].name, count=17),)).build()
    with pytest.raises(InvalidInput, match="at least one context"):
        measure_channels(detector, {})
