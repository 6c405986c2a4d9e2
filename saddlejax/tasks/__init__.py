"""Learning problems: data sets, teachers, and any arrays."""

from ._digits import digits as digits
from ._mnist import mnist as mnist
from .named import load as load
from .task import Task as Task
from .teachers import linear_teacher as linear_teacher, single_index as single_index
