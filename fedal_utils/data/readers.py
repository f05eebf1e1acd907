"""Old names of this room, until every importer has moved to `fedal_utils.data`."""

from . import *  # noqa: F403
from .catalogue import checked_limit, within_limit  # noqa: F401
from .files import find_files as _files  # noqa: F401
from .folders import drawn_split as _parted  # noqa: F401
from .folders import split_of as _split_of  # noqa: F401
from .pixels import image_info, read_upright  # noqa: F401
from .pixels import in_order as _in_order  # noqa: F401
from .pixels import size_pair as _size_pair  # noqa: F401
from .types import row_numbers as _rows  # noqa: F401

MAX_BYTES = 8 << 30
