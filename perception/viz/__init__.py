"""Pictures and reports."""

from ...core.private_folder import give_matplotlib_a_folder

give_matplotlib_a_folder()  # before any file of this folder imports matplotlib
