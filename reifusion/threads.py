"""How long threads wait busily for one another: said before PyTorch is imported, which reads it then."""

from __future__ import annotations

import os

# OpenMP's threads meet thousands of times in a picture, and the first to come looks out for the others in a
# loop: 300,000 turns of it, if nobody says otherwise. A core that another program wants as well is then lost
# for both. After this many turns, some 20 microseconds, a thread goes to sleep.
SPINS = 1000


def wait_briefly() -> None:
    """Has threads give up their cores while they wait; for programs, before they import PyTorch.

    What the user's environment says about it is left as it is.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
