"""Samplers and schedules beyond those of the model, as other programs have them.

Importing the package adds them to SAMPLERS and SCHEDULES. To add one, write a class with a `name` and a
`title` here, or a function under `@schedule`, and its names in other programs in `elsewhere.py`.
"""

from . import again, multistep, schedules, tcd, two_calls  # noqa: F401
