"""From moments to Fisher information: no network, no processes."""
