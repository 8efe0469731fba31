"""Adapting a classifier to an unlabelled target domain whose categories differ from the source's (GLC, GLC++, LEAD)."""
