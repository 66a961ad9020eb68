"""Back ends that execute an epoch plan."""
