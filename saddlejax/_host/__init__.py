"""What concerns the machine: interrupts, threads, stopping."""
