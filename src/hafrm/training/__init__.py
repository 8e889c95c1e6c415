"""One optimiser step, exactly; and the loop around it."""
