"""What is compared in docs/features.md: one row per feature, and what checks that we have it. `feature_table.py` runs the checks.

The columns of the others were read in their repositories, at the states that `PEERS` names; their marks are judgements of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mark = Literal["●", "◐", "○"]
PEERS = {
    "OpenPCDet": "v0.6.0, 2024-04",
    "mmdetection3d": "v1.4.0, 2024-01",
    "ST3D": "ST3D and ST3D++, 2024-07",
    "3DTrans": "2024-01",
    "Open3D-ML": "2026-02",
}
"""The toolkits that we compare with, and the state that was read."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line of ours, and what it must print."""

    words: tuple[str, ...]
    """What follows `upcycle3d`."""
    prints: tuple[str, ...]
    """Texts that its output must hold; it must end without an error too."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A feature."""

    feature: str
    """What it is."""
    peers: tuple[str, str, str, str, str]
    """What the toolkits of `PEERS` have, in that order."""
    mark: Mark
    """Whether we have it, if every check passes."""
    text: str = ""
    """What ours is like, in a few words."""
    tests: tuple[str, ...] = ()
    """Tests that fail without this feature: `file::function`, from the folder `tests`. One that is skipped proves nothing."""
    commands: tuple[Command, ...] = ()
    """Commands that must work."""
    source: str = ""
    """A check of `feature_table.SOURCE_CHECKS` on our own files."""
    why: str = ""
    """Why ours is not ●, as a sentence. It must be there where one of the others has ●."""


DATA = (
    Row(
        feature="KITTI",
        peers=("●", "●", "●", "●", "●"),
        mark="●",
        tests=(
            "datasets/test_kitti_reader.py::test_labels_and_predictions_are_each_others_inverse",
            "datasets/test_kitti_reader.py::test_frame_is_cropped_to_what_the_camera_sees",
        ),
    ),
    Row(
        feature="Waymo",
        peers=("● needs TF SDK", "● needs TF SDK", "●", "●", "●"),
        mark="●",
        text="read without TensorFlow",
        tests=(
            "datasets/test_waymo_dataset.py::test_simulated_points_and_labels_survive_the_tables",
            "datasets/test_waymo_dataset.py::test_both_returns_all_lasers_and_no_label_zones_come_back",
        ),
    ),
    Row(
        feature="Lyft L5",
        peers=("● no benchmark table", "● published rows (PointPillars, SSN)", "● (DA target)", "●", "●"),
        mark="●",
        text="read without its SDK",
        tests=("datasets/test_nuscenes_simulated.py::test_points_boxes_and_counts_read_back_as_they_were_made",),
    ),
    Row(
        feature="nuScenes, ONCE, Pandaset, Argo2",
        peers=("●", "◐ nuScenes", "◐ nuScenes", "◐ nuScenes, ONCE", "◐ nuScenes, Argoverse, Pandaset"),
        mark="●",
        text="readers; the protocols of their scores are not there",
        tests=(
            "datasets/test_nuscenes_reader.py::test_points_and_boxes_come_with_x_forward_and_the_origin_at_the_sensor",
            "datasets/test_readers.py::test_boxes_hold_exactly_their_points_in_our_axes",
        ),
    ),
    Row(
        feature="custom dataset path",
        peers=(
            "◐ one class + md page; most asked issue",
            "◐ docs; create_data.py custom raises NotImplementedError",
            "○",
            "○",
            "● base class",
        ),
        mark="●",
        text="a folder of scans and text labels, or any Python object with frames",
        tests=(
            "datasets/test_folder_dataset.py::test_frames_carry_points_boxes_classes_and_counts",
            "test_own_data_page.py::test_every_block_of_the_page_runs_in_order",
        ),
    ),
    Row(
        feature="preparation command",
        peers=(
            "module call with class names and paths in code",
            "tools/create_data.py",
            "as OpenPCDet",
            "as OpenPCDet",
            "● scripts",
        ),
        mark="●",
        text="one command; resumable, parallel, verified",
        tests=(
            "datasets/test_prepared.py::test_a_killed_preparation_goes_on_where_it_was",
            "datasets/test_prepared.py::test_bytes_do_not_depend_on_the_number_of_workers",
            "datasets/test_prepared_damaged.py::test_inspect_verify_names_damaged_frames_and_damaged_databases",
        ),
    ),
    Row(
        feature="index format",
        peers=("pickle", "pickle", "pickle", "pickle", "pickle/npy"),
        mark="●",
        text="JSON and Parquet with a version; no pickle",
        tests=(
            "datasets/test_prepared_damaged.py::test_a_header_with_wrong_entries_is_refused",
            "test_layers.py::test_habits_that_are_not_ours",
        ),
    ),
    Row(
        feature="synthetic data for tests",
        peers=("○", "◐ small fixtures", "○", "○", "◐"),
        mark="●",
        text="scenes from a seed, in the layouts of KITTI, Waymo and Lyft",
        tests=(
            "datasets/test_simulation.py::test_the_kitti_reader_reads_what_was_simulated",
            "datasets/test_waymo_prepare.py::test_simulate_writes_the_layout_and_completes_it",
            "datasets/test_nuscenes_simulated.py::test_simulate_writes_lyft_s_layout_and_says_how_to_go_on",
        ),
    ),
    Row(
        feature="GT-database sampling",
        peers=("●", "●", "●", "●", "●"),
        mark="●",
        text="and at feature level, bound to the split",
        tests=(
            "datasets/test_gt_database.py::test_sampling_fills_up_to_the_count_and_nothing_overlaps",
            "datasets/test_gt_database.py::test_a_database_of_another_split_is_refused",
            "server/test_feature_gt.py::test_pasting_replaces_the_footprint_and_touches_no_other_cell",
        ),
    ),
    Row(
        feature="raw augmentation (flip, yaw, scale, translate, per object)",
        peers=("● (+ pyramid)", "●", "● (+ ROS, SN)", "●", "●"),
        mark="◐",
        text="flip, yaw, scale as values with an inverse; sizes of single objects (ROS, SN)",
        tests=(
            "datasets/test_augment.py::test_the_inverse_undoes_the_movement",
            "datasets/test_augment.py::test_augmentations_stay_in_their_ranges_and_follow_the_generator",
            "datasets/test_object_sizes.py::test_factors_are_drawn_for_each_object_and_reproducible",
        ),
        why="Scenes and single objects are not moved sideways: the published settings of SECOND-IoU and PV-RCNN that we follow do not do it.",
    ),
    Row(
        feature="GT database on CPU for Waymo/Lyft",
        peers=("○ points_in_boxes_gpu", "◐", "○", "○", "●"),
        mark="●",
        tests=(
            "datasets/test_waymo_prepare.py::test_prepare_goes_on_past_what_is_broken_and_lists_it",
            "datasets/test_gt_database.py::test_objects_come_back_as_they_stood",
        ),
    ),
    Row(
        feature="preparation time and disk shown",
        peers=("○", "◐ docs", "○", "○", "○"),
        mark="◐",
        text="the time that is left, on the way; not the disk",
        tests=("tools/test_console.py::test_progress_says_how_long_the_rest_takes",),
        why="How large a prepared dataset becomes is known when it is written.",
    ),
)

MODELS = (
    Row(
        feature="SECOND / SECOND-IoU",
        peers=("●/●", "●/○", "●/●", "●/◐", "○"),
        mark="●",
        text="both",
        tests=(
            "models/test_second_iou.py::test_it_learns_one_scene_by_heart",
            "interchange/test_config_writing.py::test_second_comes_back_equal",
        ),
    ),
    Row(
        feature="PV-RCNN",
        peers=("● (++)", "●", "●", "●", "○"),
        mark="●",
        tests=(
            "models/test_pv_rcnn.py::test_it_learns_two_scenes_by_heart",
            "models/test_pv_rcnn.py::test_shapes_from_points_to_boxes",
        ),
    ),
    Row(
        feature="PointPillars / CenterPoint",
        peers=("●", "●", "◐", "●", "● / ○"),
        mark="○",
        why="The features of a vehicle are voxels at a 3D cut, and both methods we build on are published with SECOND-IoU and PV-RCNN; "
        "docs/architecture.md says how a detector is added.",
    ),
    Row(
        feature="pretrained zoo",
        peers=("● Google Drive; none for Waymo (licence)", "●", "●", "●", "●"),
        mark="◐",
        text="weights of OpenPCDet and mmdetection3d are imported; a small detector of our own in examples/",
        tests=(
            "tools/test_import.py::test_a_checkpoint_becomes_a_detector_and_an_encoder_for_the_fleet",
            "interchange/test_mmdet3d_weights.py::test_names_and_shapes_are_those_of_mmdetection3d_in_both_directions",
            "test_examples.py::test_an_example_runs[detect.py]",
        ),
        why="Weights that were trained on KITTI, Waymo and the others carry the licences of these data, so we give none away.",
    ),
    Row(
        feature="DDP",
        peers=("●", "●", "●", "●", "◐"),
        mark="●",
        text="torchrun",
        tests=("training/test_loop.py::test_two_ranks_equal_one_with_the_double_batch_and_stop_together",),
    ),
    Row(
        feature="AMP",
        peers=("● --use_amp", "●", "○", "◐", "●"),
        mark="◐",
        text="bf16 and fp16 with parts in fp32, on CUDA",
        tests=(
            "models/test_pv_rcnn.py::test_a_step_in_half_precision_is_close_to_one_in_full",
            "models/test_set_abstraction.py::test_half_precision_does_not_lose_offsets_of_centimeters",
        ),
        why="The numbers are tested with bf16 on the CPU; the paths on CUDA were not run yet.",
    ),
    Row(
        feature="resume",
        peers=("● (lr bugs #586, #1317)", "● auto", "◐", "●", "●"),
        mark="●",
        text="equal bit by bit, also after kills",
        tests=("training/test_loop.py::test_a_run_killed_again_and_again_ends_with_the_same_bits",),
    ),
    Row(
        feature="EMA teacher",
        peers=("○", "◐ hook", "○", "◐", "○"),
        mark="●",
        text="with the statistics of batch norm",
        tests=("training/test_ema.py::test_teacher_equals_the_closed_form_and_has_the_last_statistics",),
    ),
    Row(
        feature="logging",
        peers=("tensorboardX", "TB, wandb, mmengine", "tensorboardX", "tensorboardX", "TB"),
        mark="●",
        text="stdout and JSON lines; TensorBoard, wandb, mlflow, trackio",
        tests=(
            "training/test_run_folder.py::test_tensorboard_gets_the_same_values",
            "training/test_trackers.py::test_a_tracker_that_fails_is_reported_once_counted_and_stops_nothing",
        ),
    ),
    Row(
        feature="determinism / seed",
        peers=("◐ --fix_random_seed", "●", "◐", "◐", "○"),
        mark="●",
        text="the same bits again, tested on the CPU",
        tests=(
            "training/test_loop.py::test_training_with_workers_gives_the_same_bits",
            "server/test_trainer.py::test_a_run_that_was_cut_off_goes_on_bit_for_bit",
        ),
    ),
    Row(
        feature="SSL",
        peers=("○", "○", "○", "●", "○"),
        mark="●",
        text="UpCycling and the methods that it is compared with",
        tests=(
            "server/test_trainer.py::test_methods_differ_in_what_they_learn",
            "server/test_pseudo_labels.py::test_hybrid_labels_are_inexact_and_incomplete_and_trusted_ones_the_truth",
        ),
    ),
    Row(
        feature="domain adaptation",
        peers=("○", "○", "●", "●", "○"),
        mark="●",
        text="self-training, object sizes, other classes (GLC)",
        tests=(
            "server/test_self_training.py::test_labels_are_made_each_round_and_everything_is_trained",
            "adapt/glc/test_adapter.py::test_adaptation_helps",
        ),
    ),
    Row(
        feature="feature export",
        peers=("○", "○", "○", "○", "○"),
        mark="●",
        text="a typed value with a version and a wire format",
        tests=(
            "vehicle/test_extractor.py::test_a_smashed_scene_is_what_the_encoder_gives_sorted",
            "test_examples.py::test_an_example_runs[smash.py]",
        ),
        commands=(Command(words=("extract", "--help"), prints=("--detector", "--scans", "--codec")),),
    ),
    Row(
        feature="privacy: threat model, attack, payload",
        peers=("○", "○", "○", "○", "○"),
        mark="●",
        text="attacks, defences and bytes of every upload, with measured numbers",
        tests=(
            "privacy/test_occupancy.py::test_two_scenes_are_learned_by_heart",
            "privacy/test_linkage.py::test_the_order_of_a_drive_comes_back_from_a_shuffled_pile",
            "privacy/test_defences.py::test_a_vehicle_sends_what_its_defences_leave_and_the_server_reads_it",
            "vehicle/test_extractor.py::test_the_report_counts_bytes_and_times_of_every_stage",
        ),
    ),
)

ENGINEERING = (
    Row(
        feature="KITTI AP (R11, R40)",
        peers=("● numba.cuda at import", "● same", "●", "●", "◐ own mAP"),
        mark="●",
        text="on the CPU, compared with a slow reference",
        tests=(
            "evaluation/test_kitti_evaluation.py::test_everything_found_is_100",
            "evaluation/test_kitti_evaluation.py::test_thresholds_sample_recall_evenly",
            "evaluation/test_kitti_against_reference.py::test_random_datasets_agree_with_the_slow_reference",
        ),
    ),
    Row(
        feature="Waymo mAP/mAPH",
        peers=("● via TF package", "● via binary/TF", "●", "●", "◐"),
        mark="●",
        text="own L1/L2 on the CPU, and files for the official tool",
        tests=(
            "evaluation/test_waymo_against_reference.py::test_random_frames_score_as_the_rules_say",
            "evaluation/test_waymo_evaluation.py::test_a_turned_box_has_the_same_ap_and_its_share_of_aph",
            "evaluation/test_waymo_objects.py::test_every_field_is_where_the_proto_puts_it",
        ),
    ),
    Row(
        feature="Lyft mAP",
        peers=("● via SDK", "● via SDK", "● KITTI style", "●", "◐"),
        mark="●",
        text="own",
        tests=("evaluation/test_lyft_evaluation.py::test_random_boxes_score_as_the_rules_say",),
    ),
    Row(
        feature="breakdown by range / points / class",
        peers=("○", "○", "◐", "○", "○"),
        mark="◐",
        text="class always; range and levels by points with Waymo's rules",
        tests=(
            "evaluation/test_waymo_evaluation.py::test_ranges_are_cut_at_their_lower_edge_and_before_matching",
            "evaluation/test_waymo_evaluation.py::test_levels_follow_from_the_points_unless_the_labels_say",
        ),
        why="The rules of KITTI and Lyft know no ranges.",
    ),
    Row(
        feature="headless visualisation",
        peers=("○ windows only", "◐", "○", "○", "◐"),
        mark="●",
        text="PNG, PLY, glTF, one HTML page; Rerun and Open3D as extras",
        tests=(
            "viz/test_bev.py::test_a_box_ahead_left_is_drawn_up_left_at_its_place",
            "viewers/test_files.py::test_ply_files_hold_points_cells_and_the_edges_of_boxes",
            "viewers/test_files.py::test_a_gltf_file_holds_a_scene_for_each_frame",
        ),
    ),
    Row(
        feature="config system",
        peers=(
            r"YAML + EasyDict + \_BASE_CONFIG\_",
            r"Python dicts + \_base\_ + registry",
            "as OpenPCDet",
            "as OpenPCDet",
            "YAML + registry",
        ),
        mark="●",
        text="frozen dataclasses; options, YAML or JSON over named presets",
        tests=(
            "tools/test_config_file.py::test_the_whole_configuration_is_printed_and_read_back",
            "tools/test_config_file.py::test_options_on_the_command_line_win",
        ),
    ),
    Row(
        feature="CLI help that explains",
        peers=("◐", "◐", "○", "○", "◐"),
        mark="●",
        text="every option has a sentence; misspelt words get an answer",
        tests=("tools/test_console.py::test_a_misspelt_word_is_answered_with_the_nearest_right_one",),
        commands=(
            Command(words=("--help",), prints=("prepare", "upcycle", "evaluate")),
            Command(words=("predict", "--help"), prints=("--detector", "--scans", "--format")),
        ),
    ),
    Row(
        feature="Docker",
        peers=("◐ (cu116 and older)", "● (torch 1.9, CUDA 11.1)", "○", "◐", "○"),
        mark="◐",
        text="one file, CPU and GPU",
        tests=(
            "test_container.py::test_the_image_takes_every_package_and_every_file_that_the_build_reads",
            "test_container.py::test_torch_comes_from_its_own_index_before_the_package_with_the_tested_versions",
        ),
        why="The image was not built yet: a test builds it and runs the main job in it where a docker engine answers.",
    ),
    Row(
        feature="CPU: train / infer / eval",
        peers=("○/○/○", "◐/◐/○", "○", "○", "●/●/●"),
        mark="●",
        text="all three",
        tests=("test_own_data_page.py::test_the_main_job_of_the_readme_runs",),
    ),
    Row(
        feature="Windows",
        peers=("○ (#1730)", "◐", "○", "○", "●"),
        mark="○",
        why="Stores, runs and uploads are kept whole with file locks and forked processes of Linux.",
    ),
    Row(
        feature="ONNX / TensorRT",
        peers=("○ (#228)", "◐ mmdeploy, separate, stale", "○", "○", "○"),
        mark="◐",
        text="the server's half as ONNX, the vehicle's by AOTInductor; no TensorRT",
        tests=("export/test_onnx.py::test_the_graphs_and_two_suppressions_are_the_detector",),
        why="A TensorRT stack needs machines that we cannot test on.",
    ),
    Row(
        feature="docs",
        peers=("few md", "readthedocs EN/ZH", "README", "good md", "README"),
        mark="●",
        text="README, pages whose commands are tested, a site with an API reference, three notebooks",
        tests=(
            "test_release.py::test_every_page_is_in_the_site",
            "test_release.py::test_every_public_name_is_on_the_api_page",
            "test_release.py::test_notebooks_are_small_and_were_run_from_top_to_bottom",
        ),
    ),
    Row(
        feature="test files",
        peers=("0", "117 (63 gated on CUDA)", "0", "0", "2"),
        mark="●",
        text="more than 250; two hold a test that needs CUDA",
        source="test files",
    ),
    Row(
        feature="CI",
        peers=("stale bot only", "●", "○", "○", "●"),
        mark="◐",
        text="one script, .ci/run, for any service",
        source="ci",
        why="The repository belongs to no service, so there is no public record of runs.",
    ),
    Row(
        feature="functions with a return type",
        peers=("3 %", "73 %", "2 %", "-", "2 %"),
        mark="●",
        text="all public ones but kernels of numba",
        source="return types",
    ),
    Row(
        feature="functions with a docstring",
        peers=("31 %", "77 %", "31 %", "-", "45 %"),
        mark="●",
        text="all public ones, with shapes and units",
        tests=("test_docstrings.py::test_public_names_and_fields_are_documented",),
    ),
    Row(
        feature="bare or blanket except / .cuda() calls",
        peers=("26 / 80", "0 / 230", "16 / 31", "94 / 94", "5 / 3"),
        mark="◐",
        text="0 bare, fewer than 50 blanket / 0",
        source="except and cuda",
        why="A blanket except stands where code of others is called, and where a worker passes its error on; none hides one.",
    ),
    Row(
        feature="removed numpy aliases (np.int, ...)",
        peers=("22", "0", "6", "14", "2"),
        mark="●",
        text="0",
        source="numpy aliases",
    ),
    Row(
        feature="compiled code needed to import",
        peers=("8 CUDA extensions + SharedArray", "mmcv (source build)", "CUDA ext.", "CUDA ext.", "none (open3d wheel)"),
        mark="●",
        text="none",
        source="no compiled code",
    ),
)

SECTIONS = {"Data": DATA, "Models and training": MODELS, "Evaluation, deployment, engineering": ENGINEERING}
"""All rows, in the order of the page."""
