"""GLC, GLC++ and LEAD on tensors: a classifier meets an unlabeled target domain with other classes.

GLC: "Upcycling Models under Domain and Category Shift" (Qu et al., CVPR 2023). GLC++ is its extension by an affinity loss, LEAD
("LEAD: Learning Decomposition for Source-free Universal Domain Adaptation", Qu et al., CVPR 2024) another way to make labels.

Read in this order:

1. `pseudo_labels.py`: the labels that every method makes for the target's samples, and the check of the input.
2. `one_vs_all.py`: GLC's labels, next to the description in the paper.
3. `agreed_labels.py`: the default, labels on which clusters, classifier and neighbors agree. `guard.py` compares them with no adaptation;
   both use `neighborhood.py`.
4. `class_number.py`: the estimate of the number of target classes, which the labels depend on.
5. `adapter.py`: the training; `GLCAdapter(...).fit(inputs)`. It uses `losses.py`, `memory_bank.py` and `networks.py`, and returns the
   model of `adapted_model.py`.
6. `unknown_rule.py`: the unknown score of a sample and the threshold from which the sample is unknown.
7. `lead_labels.py`: LEAD's labels. `kmeans.py`: clustering. `metrics.py`: what is measured where there are labels.
8. `adapt_features.py`: features from a file, without training. It uses `feature_file.py`, `feature_labels.py`,
   `feature_report.py` and `plots.py`.
"""
