"""A job's folder belongs to one configuration and the same frames, and its methods share one source model."""

import json
from dataclasses import replace

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import PipelineConfig, RunOptions
from upcycle3d.perception.recipes.method_run import MethodResult, MethodRun
from upcycle3d.perception.recipes.pipeline import Pipeline
from upcycle3d.perception.recipes.presets import SMALL

QUIET = RunOptions(say=lambda text: None, processes=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    size = SimulationSize(labeled=2, fleet=1, validation=1)
    data = simulated_adaptation(tmp_path_factory.mktemp("data"), "waymo", "lyft", size=size, seed=0, classes=("Car",), workers=1)
    return PipelineConfig(
        labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol="kitti", preset=SMALL, seed=0
    )


def test_a_folder_of_another_job_is_refused_and_names_the_difference(config, tmp_path):
    Pipeline(config, tmp_path, QUIET)
    with pytest.raises(InvalidInput, match=r"seed: stored 0, now 1"):
        Pipeline(replace(config, seed=1), tmp_path, QUIET)
    with pytest.raises(InvalidInput, match=r"labeled: stored '2 frames [0-9a-f+]+', now '1 frames"):
        Pipeline(replace(config, labeled=config.fleet), tmp_path, QUIET)


def test_upcycling_settings_belong_to_the_method_not_to_the_job(config, tmp_path):
    Pipeline(config, tmp_path, QUIET)
    other = replace(config, preset=replace(SMALL, upcycle=replace(SMALL.upcycle, unlabeled_batch=4)))
    Pipeline(other, tmp_path, QUIET)


def test_a_given_source_model_is_taken_and_must_be_of_the_preset(config, tmp_path):
    loop = replace(SMALL.train.loop, optim=replace(SMALL.train.loop.optim, total_steps=1))
    short = replace(config, preset=replace(SMALL, train=replace(SMALL.train, loop=loop)))
    source = Pipeline(short, tmp_path / "a", QUIET).train_source_model()
    given = Pipeline(replace(short, source_model=source), tmp_path / "b", QUIET)
    assert given.train_source_model() == source
    (result,) = dict(given.results({"plain": MethodRun(method="source_only", upcycle=SMALL.upcycle)})).values()
    assert result.student == result.teacher
    assert set(result.student) == {"Car 3D 0.7", "Car BEV 0.7", "Car 3D 0.5", "Car BEV 0.5"}
    other = replace(short.preset, detector=replace(SMALL.detector, encoder=replace(SMALL.detector.encoder, max_voxels=9)))
    with pytest.raises(InvalidInput, match="a detector other than the preset's"):
        Pipeline(replace(short, source_model=source, preset=other), tmp_path / "c", QUIET).train_source_model()


def test_the_best_step_is_taken_metric_by_metric_and_survives_json():
    history = ((100, {"a": 3.0, "b": 1.0}), (200, {"a": 2.0, "b": 5.0}))
    result = MethodResult(student=history[-1][1], teacher=history[-1][1], history=history, seconds=1.0)
    assert result.best() == {"a": 3.0, "b": 5.0}
    assert MethodResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_method_is_scored_at_least_once():
    with pytest.raises(InvalidInput, match="scores_along = 0"):
        RunOptions(scores_along=0)
