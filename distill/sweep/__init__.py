"""Sweeps: many recipes at once, work that they share done once, and an answer to which of them should ship.

    distill sweep sweep.yaml --dry-run      trials, distinct stages, what is done, time and dollars
    distill sweep sweep.yaml                run it, going on where it stopped
    distill sweep status sweep.yaml         how far it is, from another shell
    distill sweep report sweep.yaml         one HTML page, with CSV and JSON beside it
    distill sweep ship sweep.yaml --where "accuracy>=0.8" --min bytes

`config` is the file, `trials` turns it into recipes, `graph` into distinct stages; `schedule` runs them through an
executor and writes what happened into the sweep's folder, which everything else only reads.
"""
