"""GLC on a LiDAR detector: its proposals on an unlabeled target get new labels and unknown scores; boxes and scores stay.

Read in this order:

1. `proposals.py`: what a detector proposes on a domain. `proposal_collection.py` collects it, `proposal_file.py` keeps it in one
   file, `proposal_cache.py` avoids collecting it twice.
2. `class_map.py`: what the class names of a target dataset mean to a detector that was trained on another.
3. `proposal_matching.py`: which labeled object each proposal lies on.
4. `proposal_classifier.py`: the classifier of proposals, with background as one of its classes. `classifier_training.py` trains it
   on the source, `classifier_file.py` stores it.
5. `open_set.py`: from probabilities to a known class or unknown.
6. `adaptation.py`: adapts the classifier to the target. `detections_file.py` writes the new labels.
7. `proposal_metrics.py`, `measure.py` and `adaptation_report.py`: measurements where the target has labels, numbers and a page.
8. `adapt_detector.py`: all of it in one call.
"""
