"""A job's folder belongs to one configuration and the same frames, and its trials share one source model."""

from dataclasses import replace

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes.experiments import Size, simulated_adaptation
from upcycle3d.perception.recipes.pipeline import Pipeline, PipelineConfig, RunOptions, Trial, TrialResult, closed_gap
from upcycle3d.perception.recipes.presets import SMALL

QUIET = RunOptions(say=lambda text: None, processes=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    size = Size(labeled=2, fleet=1, validation=1)
    data = simulated_adaptation(tmp_path_factory.mktemp("data"), "waymo", "lyft", size=size, seed=0, classes=("Car",), workers=1)
    return PipelineConfig(
        labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol="kitti", preset=SMALL, seed=0
    )


def test_a_folder_of_another_job_is_refused_and_names_the_difference(config, tmp_path):
    Pipeline(config=config, folder=tmp_path, options=QUIET)
    with pytest.raises(InvalidInput, match=r"seed: stored 0, now 1"):
        Pipeline(config=replace(config, seed=1), folder=tmp_path, options=QUIET)
    with pytest.raises(InvalidInput, match=r"labeled: stored '2 frames [0-9a-f]+', now '1 frames"):
        Pipeline(config=replace(config, labeled=config.fleet), folder=tmp_path, options=QUIET)


def test_upcycling_settings_belong_to_the_trial_not_to_the_job(config, tmp_path):
    Pipeline(config=config, folder=tmp_path, options=QUIET)
    other = replace(config, preset=replace(SMALL, upcycle=replace(SMALL.upcycle, unlabeled_batch=4)))
    Pipeline(config=other, folder=tmp_path, options=QUIET)


def test_a_given_checkpoint_is_taken_and_must_be_of_the_preset(config, tmp_path):
    loop = replace(SMALL.train.loop, optim=replace(SMALL.train.loop.optim, total_steps=1))
    short = replace(config, preset=replace(SMALL, train=replace(SMALL.train, loop=loop)))
    source = Pipeline(config=short, folder=tmp_path / "a", options=QUIET).train_source()
    given = Pipeline(config=replace(short, checkpoint=source), folder=tmp_path / "b", options=QUIET)
    assert given.train_source() == source
    (result,) = dict(given.results({"plain": Trial(method="source_only", upcycle=SMALL.upcycle)})).values()
    assert result.student == result.teacher
    assert set(result.student) == {"Car 3D 0.7", "Car BEV 0.7", "Car 3D 0.5", "Car BEV 0.5"}
    other = replace(short.preset, detector=replace(SMALL.detector, encoder=replace(SMALL.detector.encoder, max_voxels=9)))
    with pytest.raises(InvalidInput, match="a detector other than the preset's"):
        Pipeline(config=replace(short, checkpoint=source, preset=other), folder=tmp_path / "c", options=QUIET).train_source()


def test_the_best_step_is_taken_metric_by_metric_and_survives_its_file(tmp_path):
    history = ((100, {"a": 3.0, "b": 1.0}), (200, {"a": 2.0, "b": 5.0}))
    result = TrialResult(student=history[-1][1], teacher=history[-1][1], history=history, seconds=1.0)
    assert result.best() == {"a": 3.0, "b": 5.0}
    result.write(tmp_path / "r.json", seed=3)
    assert TrialResult.read(tmp_path / "r.json") == result


def test_the_closed_gap_is_null_where_there_is_no_gap():
    assert closed_gap(10, 15, 30) == 25
    assert closed_gap(10, 15, 11.9) is None
    assert closed_gap(10, 15, 30, spread=25) is None


def test_a_trial_is_scored_at_least_once():
    with pytest.raises(InvalidInput, match="scores_along = 0"):
        RunOptions(scores_along=0)
