"""A job's folder belongs to one configuration, and what does not depend on the upcycling settings can be shared."""

from dataclasses import replace
from pathlib import Path

import pytest

from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.main_job import MainJob, MainJobConfig, closed_gap
from upcycle3d.perception.presets import SMALL
from upcycle3d.perception.structures import InvalidInput

CONFIG = MainJobConfig(
    source=domain("waymo"), target=domain("lyft"), labelled=2, fleet=1, validation=1, seed=0, preset=SMALL, workers=1
)


def job(folder: Path, config: MainJobConfig = CONFIG) -> MainJob:
    return MainJob(config=config, folder=folder, say=lambda text: None)


def test_a_folder_of_another_job_is_refused_and_names_the_difference(tmp_path):
    job(tmp_path / "a").data()
    with pytest.raises(InvalidInput, match=r"labelled: stored 2, now 3"):
        job(tmp_path / "a", replace(CONFIG, labelled=3)).data()


def test_a_variant_of_the_upcycling_settings_uses_the_same_data(tmp_path):
    job(tmp_path / "a").data()
    variant = replace(CONFIG, preset=replace(SMALL, upcycle=replace(SMALL.upcycle, unlabelled_batch=4)))
    shared = job(tmp_path / "b", variant)
    shared.share(tmp_path / "a")
    shared.data()  # nothing left to do, and it does not mind
    assert shared.split("source", "train").ids == job(tmp_path / "a").split("source", "train").ids
    assert (tmp_path / "b" / "source").resolve() == (tmp_path / "a" / "source").resolve()


def test_nothing_is_shared_with_a_job_that_differs_in_more(tmp_path):
    job(tmp_path / "a")._claim_folder()
    with pytest.raises(InvalidInput, match="seed: stored 0, now 1; only upcycle settings may differ"):
        job(tmp_path / "b", replace(CONFIG, seed=1)).share(tmp_path / "a")
    with pytest.raises(InvalidInput, match="holds no job to share"):
        job(tmp_path / "b").share(tmp_path / "nowhere")


def test_the_closed_gap_is_null_where_there_is_no_gap():
    assert closed_gap(10, 15, 20) == 50
    assert closed_gap(10, 15, 11.9) is None
    assert closed_gap(10, 15, 20, spread=11) is None
