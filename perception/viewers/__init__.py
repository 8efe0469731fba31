"""Viewers of three-dimensional frames: one value to draw, and one short writer for each kind of file or window."""
