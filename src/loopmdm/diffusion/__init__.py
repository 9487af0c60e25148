"""Masked diffusion: schedule.py (noise), loss.py (corruption, the NELBO, fine-tuning), bounds.py (measuring).

montecarlo.py holds the masks and passes behind bounds.py, module.py the loss as a module for DDP.
"""

from .bounds import Difference, Likelihood, TimeProfile, likelihood, nelbo_by_time, rolling
from .loss import NELBO, T_MIN, Corruption, corrupt, nelbo, sample_loops, sft, stratified_times
from .module import NELBOLoss
from .schedule import EPS, SCHEDULES, Cosine, Linear, LogLinear, Polynomial, Schedule, build_schedule

__all__ = [
    "EPS",
    "NELBO",
    "SCHEDULES",
    "T_MIN",
    "Corruption",
    "Cosine",
    "Difference",
    "Likelihood",
    "Linear",
    "LogLinear",
    "NELBOLoss",
    "Polynomial",
    "Schedule",
    "TimeProfile",
    "build_schedule",
    "corrupt",
    "likelihood",
    "nelbo",
    "nelbo_by_time",
    "rolling",
    "sample_loops",
    "sft",
    "stratified_times",
]
