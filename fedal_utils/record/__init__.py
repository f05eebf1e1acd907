"""What happened: runs that resume, records of them, verdicts.

run: one run's folder, to which a round is added at a time. stored: what is read back of it.
records: tables over all runs of a setting, and the published record of every run.
verdicts: a paper's numbers beside ours; published tables and figures.
files: atomic writes, locks, checksums. environment: where a run ran, and its progress.
"""

from .environment import banner, environment
from .files import lock, project_root, write_atomic
from .records import collect, merge, missing, publish, queries, read_record, table, times
from .run import Run, every_round, runs
from .stored import shared, state
from .verdicts import (
    About,
    about,
    check_formula,
    compare_paper,
    order_verdict,
    publish_figure,
    publish_table,
    publish_verdicts,
    read_paper,
)
