"""Notebooks: a strict runner of one, of many (batch), published copies, and the README's tables (scoreboard)."""

from .batch import reproduce
from .copies import address, badges, code_digest, navigation, publish
from .runner import NotebookFailed, checked, default_profile, executed, find, parameters, read, run
from .scoreboard import scoreboard
