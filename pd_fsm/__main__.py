"""`python -m pd_fsm` is `pd-fsm`."""

import sys

from pd_fsm.cli import main

sys.exit(main())
