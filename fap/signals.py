"""The signals that ask a process to end: the same for training and for every other command.

Standard library only, since a command obeys them while it still imports torch.
"""

import signal

# A terminal's Ctrl-C; schedulers' end of time and preemption; a closed terminal; Slurm's and
# submitit's warnings.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
