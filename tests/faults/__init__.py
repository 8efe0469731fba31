"""The fault campaign: damaged inputs for every reader, and processes killed at any moment.

    make faults MINUTES=20 SEEDS="0 1 2"

`mutations.py` damages files, `readers.py` lists what reads them, `fuzzing.py` runs one input under limits of time and memory,
`killing.py` kills a job and goes on with it, `kill_cases.py` lists the jobs, `__main__.py` is the campaign. A small seeded share
of both runs with the other tests (`test_faults.py`). docs/reliability.md explains the table.
"""
