"""Imported by one process only: the server that workers are forked from. What the system refuses it, whoever asked for a process says."""

from __future__ import annotations

import logging
import sys
import warnings
from types import TracebackType


def _say_nothing(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """In place of a traceback: the one who asked gets no answer, and says so in one line."""


warnings.filterwarnings("ignore", module=rf"(?!{__name__.partition('.')[0]})")  # as the command line does
sys.excepthook = _say_nothing
logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # says where its fonts are cached, when that is not at home
