"""What happened: runs that resume (run), records and tables of them (records), verdicts, files, environment."""

from .environment import banner, environment
from .files import FULL, data_folder, project_root, write_atomic
from .records import merge, missing, publish, queries, read_record, table
from .run import Run, every_round, runs, shared, state
from .verdicts import about, check_formula, compare_paper, publish_verdicts, read_paper, save
