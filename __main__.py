"""`python -m upcycle3d COMMAND …`: the same program as `upcycle3d COMMAND …`, where the script is not on the path."""

from .tools.main import main

if __name__ == "__main__":
    main()
